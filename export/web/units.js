export const inMegabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

export const inSeconds = (seconds) => `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
