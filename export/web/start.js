// Says why the page cannot run, where it cannot: modules do not load from a file, and old browsers know none.

(function () {
  function refuse(why) {
    addEventListener("DOMContentLoaded", function () {
      var notice = document.getElementById("refusal");
      notice.textContent = why;
      notice.hidden = false;
      document.getElementById("loading").hidden = true;
    });
    window.refused = true;
  }

  if (location.protocol === "file:") {
    refuse("Browsers load this page from a server only. In its folder run: python -m http.server, and open " +
      "http://localhost:8000/");
  } else if (typeof WebAssembly !== "object" || typeof BigInt64Array === "undefined") {
    refuse("This browser has no WebAssembly, in which the network runs. It may be switched off (some browsers do so in " +
      "their strictest mode), or the browser may be older than 2021.");
  } else if (!("noModule" in HTMLScriptElement.prototype) || typeof Worker === "undefined") {
    refuse("This browser is too old: it has no modules or no workers. Any of 2023 or later will do.");
  }
})();
