/** The overlay that explains the page and lists its keys. */

function createHelp(data, store, services) {
  return {toggle() {}, close: () => false};
}
