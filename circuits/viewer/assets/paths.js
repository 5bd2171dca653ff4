/** Strongest paths between two nodes. */

/** The strongest path from a node to another, as `{nodes, edges, share}`; null where there is none. */
function strongestPath(data, from, to) {
  return null;
}
