// The map of probabilities that the rule for Dream keeps: a line of entries for each position of each row,
// filled from the front; a free entry is 0.
#pragma once

#include "decode/policy_rows.cuh"

namespace bbk {

struct MapEntry {
  int32_t place;      // of the token; of the first free entry if it has none; map_entries if there is neither
  float probability;  // 0 if it has none
};

// `at`: row * gen_length + position, as below.
BBK_HD MapEntry find_entry(const PolicyParams& params, int64_t at, int32_t token) {
  const int64_t line = at * params.map_entries;
  for (int entry = 0; entry < params.map_entries; ++entry) {
    const float probability = params.state.map_probability[line + entry];
    if (probability == 0.0f || params.state.map_token[line + entry] == token) {
      return MapEntry{entry, probability};
    }
  }
  return MapEntry{params.map_entries, 0.0f};
}

// Writes what a prediction says is likely: tokens that have an entry, and new ones from one half on.
BBK_HD void store_likely(const PolicyParams& params, int64_t at, int64_t prediction) {
  for (int i = 0; i < kNumLikely; ++i) {
    const int32_t token = params.predictions.likely_token.value[prediction * kNumLikely + i];
    const float probability = params.predictions.likely_probability.value[prediction * kNumLikely + i];
    if (!(probability > kLeastLikely)) continue;
    const MapEntry found = find_entry(params, at, token);
    if (found.place == params.map_entries) continue;
    if (found.probability == 0.0f && !(probability >= 0.5f)) continue;
    params.state.map_token[at * params.map_entries + found.place] = token;
    params.state.map_probability[at * params.map_entries + found.place] = probability;
  }
}

BBK_HD void empty_line(const PolicyParams& params, int64_t at) {
  const int64_t line = at * params.map_entries;
  for (int entry = 0; entry < params.map_entries; ++entry) {
    if (params.state.map_probability[line + entry] == 0.0f) return;
    params.state.map_token[line + entry] = 0;
    params.state.map_probability[line + entry] = 0.0f;
  }
}

BBK_HD void take_line(const PolicyParams& params, int64_t at, int64_t source_at) {
  const int64_t line = at * params.map_entries, source = source_at * params.map_entries;
  for (int entry = 0; entry < params.map_entries; ++entry) {
    const float probability = params.state.map_probability[source + entry];
    if (probability == 0.0f && params.state.map_probability[line + entry] == 0.0f) return;
    params.state.map_token[line + entry] = params.state.map_token[source + entry];
    params.state.map_probability[line + entry] = probability;
  }
}

}  // namespace bbk
