/** What the feature index says of the graph's features; evidence.py says how it is packed. */

const unpackedEvidence = new WeakMap();

/**
 * The evidence of a node's feature, or null. Its examples are `{tokens, activations, peak, quantile}`, with texts; lists of tokens are
 * `[text, weight]`. `labels`, the best first, are the index's; `named` is what the graph knows of its own label.
 */
function evidenceOf(data, node) {
  if (!data.features.record) return null;
  if (!unpackedEvidence.has(data)) unpackedEvidence.set(data, startsOfExamples(data.features));
  const all = unpackedEvidence.get(data);
  const number = all.record[node];
  if (number < 0) return null;
  return (all.unpacked[number] ??= unpackRecord(data.features, all, number));
}

function startsOfExamples({record, records, tokens}) {
  let end = 0;
  const starts = records.map(({examples = []}) => {
    const start = end;
    for (const [, , length] of examples) end += length;
    return start;
  });
  return {record: decodeColumn(record), tokens: decodeColumn(tokens), starts, unpacked: []};
}

function unpackRecord({records, texts}, {tokens, starts}, number) {
  const packed = records[number];
  let at = starts[number];
  const examples = (packed.examples ?? []).map(([quantile, peak, length, active]) => {
    const activations = new Float64Array(length);
    for (let pair = 0; pair < active.length; pair += 2) activations[active[pair]] = active[pair + 1];
    const words = Array.from(tokens.subarray(at, (at += length)), (token) => texts[token]);
    return {tokens: words, activations, peak, quantile};
  });
  const result = {labels: [], named: null, histogram: [], ...packed, examples, isIndexed: "density" in packed};
  for (const role of ["promoted", "suppressed", "read", "read_through_heads"]) {
    result[role] = (packed[role] ?? []).map(([token, weight]) => [texts[token], weight]);
  }
  return result;
}

/** The share of a feature's firings that are weaker than an activation; inside a bin of the histogram evenly spread. */
function quantileOf({histogram, bin_width: width, max_activation: largest}, activation) {
  const total = sum(histogram);
  if (!total) return largest > 0 ? clamp(activation / largest, 0, 1) : 0;
  if (activation >= largest) return 1;
  const bin = Math.floor(activation / width);
  const below = sum(histogram.slice(0, Math.max(bin, 0)));
  return clamp((below + (histogram[bin] ?? 0) * (activation / width - bin)) / total, 0, 1);
}
