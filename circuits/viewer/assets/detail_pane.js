/** What is known of the selected node. */

function createDetailPane(element, data, store, services) {
  return {element};
}
