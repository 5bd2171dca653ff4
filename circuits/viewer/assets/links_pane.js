/** Inputs and outputs of the selected node. */

function createLinksPane(element, data, store, services) {
  return {element};
}
