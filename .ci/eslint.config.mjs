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

// Several files are one script: the names that each file takes from the others.
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
const maps = [
  "stops",
  "sides",
  "caption",
  "planes",
  "tables",
  "patches",
  "countOf",
  "sideOf",
  "planeOf",
  "unpack",
  "valuesOf",
];
const places = ["mapOf", "placeOf", "tokenAt", "nameOf", "moved"];
const explore = [
  "state",
  "view",
  "initial",
  "hovered",
  "shift",
  "pointer",
  "drag",
  "stopNow",
  "headNow",
  "shownPick",
  "panels",
];
const actions = ["hover", "pickAt", "pin", "pinWords", "toggleWord", "defaultPick", "goTo", "turn", "update"];
const buttons = [
  "makeChips",
  "drawChips",
  "makeHeads",
  "makeThumb",
  "drawThumb",
  "drawSimilar",
  "headThumbs",
  "allThumbs",
];
const controls = ["most", "onPictureKey", "drawControls", "saveState"];
const taken = (names) => ({ globals: Object.fromEntries(names.map((name) => [name, "writable"])) });

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
  { files: ["**/browse.js", "**/maps.js"], languageOptions: taken(shared) },
  { files: ["**/explore.js"], languageOptions: taken([...shared, ...maps, ...places, ...buttons, ...controls]) },
  { files: ["**/buttons.js"], languageOptions: taken([...shared, ...maps, ...places, ...explore, ...actions]) },
  {
    files: ["**/controls.js"],
    languageOptions: taken([...shared, ...maps, ...places, ...explore, ...actions, ...buttons]),
  },
];
