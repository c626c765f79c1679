// Text as tokens and back, as edgeblocks/data/tokenizer.py makes them: characters, bytes, or byte pairs.

const CHARACTERS = " abcdefghijklmnopqrstuvwxyz";
const DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
export const GAP = /(_|\[MASK\])/;

// `definition` is the content of tokenizer.json, of byte pairs alone.
export function tokenizer(kind, definition) {
  return { chars: () => characters, bytes: () => bytes, bpe: () => pairs(definition) }[kind]();
}

const characters = {
  encode(text) {
    const plain = Array.from(text, (letter) => (/[a-z0-9]/i.test(letter) ? letter.toLowerCase() : " ")).join("");
    const spelled = plain.replace(/[0-9]/g, (digit) => ` ${DIGITS[digit]} `).replace(/ {2,}/g, " ");
    return Array.from(spelled, (letter) => CHARACTERS.indexOf(letter));
  },
  decode: (tokens) => tokens.map((token) => CHARACTERS[token]).join(""),
};

const bytes = {
  encode: (text) => Array.from(new TextEncoder().encode(text)),
  decode: (tokens) => new TextDecoder().decode(Uint8Array.from(tokens)),
};

// Pieces that byte pairs never cross. Source: GPT-2's tokenizer, which `tokenizers` calls ByteLevel.
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

function pairs(definition) {
  const { vocab, merges } = definition.model;
  const letters = byteLetters(), bytesOf = new Map(letters.map((letter, byte) => [letter, byte]));
  const written = new Map(Object.entries(vocab).map(([token, id]) => [id, token]));
  const ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
  return {
    encode(text) {
      return (text.match(PIECES) ?? []).flatMap((piece) => {
        const parts = Array.from(new TextEncoder().encode(piece), (byte) => letters[byte]);
        for (;;) {
          // The pair that was learned first, wherever it stands first.
          let best = Infinity, at = -1;
          for (let i = 0; i + 1 < parts.length; i++) {
            const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
            if (rank < best) [best, at] = [rank, i];
          }
          if (at < 0) break;
          parts.splice(at, 2, parts[at] + parts[at + 1]);
        }
        return parts.map((part) => vocab[part]);
      });
    },
    decode(tokens) {
      const found = tokens.flatMap((token) => Array.from(written.get(token) ?? "", (letter) => bytesOf.get(letter)));
      return new TextDecoder().decode(Uint8Array.from(found));
    },
  };
}

// Each byte as a letter that can be seen.
function byteLetters() {
  const seen = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let others = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(seen(byte) ? byte : others++));
}
