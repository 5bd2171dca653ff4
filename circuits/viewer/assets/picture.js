/** Export of the graph pane as SVG or PNG, drawn with the same code by another pen. */

function exportPicture(format, data, store, services) {
  services.say(`Export as ${format} is not there yet`);
}
