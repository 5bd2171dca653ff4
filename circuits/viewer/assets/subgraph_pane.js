/** The pinned nodes and groups as a layered drawing. */

function createSubgraphPane(element, data, store, services) {
  return {element};
}
