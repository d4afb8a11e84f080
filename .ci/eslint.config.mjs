// The rules for the scripts of attnx/page. The scripts of a page are one script, so top-level names may be unused.
const browser = ["document", "window", "location", "history", "requestAnimationFrame", "setInterval", "clearInterval"];
const more = [
  "Blob",
  "Response",
  "DecompressionStream",
  "ImageData",
  "URLSearchParams",
  "TextDecoder",
  "getComputedStyle",
  "atob",
  "trustedTypes",
  "innerHeight",
];
const shared = [
  "$",
  "data",
  "LEVELS",
  "clamp",
  "element",
  "digits",
  "content",
  "rangeOf",
  "massMask",
  "colourOf",
  "paint",
];

export default [
  {
    files: ["**/*.js"],
    languageOptions: {
      sourceType: "script",
      ecmaVersion: 2023,
      globals: Object.fromEntries([...browser, ...more].map((name) => [name, "readonly"])),
    },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      "no-undef": "error",
      "no-unused-vars": ["error", { vars: "local" }],
      "no-redeclare": "error",
      "no-var": "error",
      "prefer-const": "error",
      eqeqeq: "error",
      "no-eval": "error",
      "no-implied-eval": "error",
      "no-shadow": ["error", { hoist: "all", builtinGlobals: false }],
      "no-use-before-define": ["error", { functions: false, classes: false, variables: false }],
      "no-unreachable": "error",
      "no-fallthrough": "error",
      "no-constant-condition": "error",
    },
  },
  {
    files: ["**/explore.js", "**/browse.js"],
    languageOptions: { globals: Object.fromEntries(shared.map((name) => [name, "readonly"])) },
  },
];
