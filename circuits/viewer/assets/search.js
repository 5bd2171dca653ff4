/** Search over labels and tokens. */

function createSearch(element, data, store, services) {
  return {focus() {}};
}
