// Cuts a plan's units into the work ranges of the stream-K kernel, one for each SM, as `_stretches` in
// blockbatch_kernels/reference/attention_units.py defines them.
#pragma once

#include "attention/attention.h"
#include "common/group.cuh"

namespace bbk {

class WorkRangePlanner {
 public:
  // tile_first: [tiles + 1] units in front of each tile of a head, and all of them.
  // parts: [tiles], any content.
  __host__ __device__ WorkRangePlanner(const AttentionPlanParams& params, const int* tile_first, int tiles,
                                       int* parts, const Group& group, int* scratch)
      : p_(params),
        tile_first_(tile_first),
        parts_(parts),
        group_(group),
        scratch_(scratch),
        tiles_(tiles),
        units_(tile_first[tiles]),
        lines_(params.processors < params.num_kv_heads ? 1 : params.num_kv_heads),
        line_tiles_(tiles * (params.num_kv_heads / lines_)),
        line_units_(units_ * (params.num_kv_heads / lines_)),
        num_sms_(params.processors / lines_) {}

  __host__ __device__ void run() const {
    int number = 0;  // work ranges of a line
    if (units_ > 0) {
      const int longest = lines_ == p_.num_kv_heads ? longest_of_whole_tiles() : INT_MAX;
      number = longest < INT_MAX ? keep_tiles_whole(longest) : cut_evenly();
    }
    group_.for_each(p_.processors - lines_ * number,
                    [&](int spare) { write(lines_ * number + spare, 0, 0, 0); });
  }

 private:
  static constexpr int kMinRange = 2;

  __host__ __device__ int tile_size(int tile) const { return tile_first_[tile + 1] - tile_first_[tile]; }

  // The longest range where none holds units of two tiles; INT_MAX where it would be too long.
  __host__ __device__ int longest_of_whole_tiles() const {
    if (tiles_ > num_sms_) return INT_MAX;
    const int least = larger(ceil_div(units_, num_sms_), kMinRange);
    int found = INT_MAX;
    for (int slack = group_.rank(); slack <= p_.max_slack && found == INT_MAX; slack += group_.size()) {
      int number = 0;
      for (int tile = 0; tile < tiles_; ++tile) number += ceil_div(tile_size(tile), least + slack);
      if (number <= num_sms_) found = least + slack;
    }
    return group_.lowest(found, scratch_);
  }

  // Calls body(line, tile of its head, units of the line in front of it) for every tile of every line.
  template <typename Body>
  __host__ __device__ void for_each_tile(Body body) const {
    group_.for_each(lines_ * line_tiles_, [&](int index) {
      const int line = index / line_tiles_, in_line = index % line_tiles_;
      const int tile = in_line % tiles_;
      body(line, tile, in_line / tiles_ * units_ + tile_first_[tile]);
    });
  }

  // Every tile in ranges of its own, as equal as they can be. Returns the number of a line's ranges.
  __host__ __device__ int keep_tiles_whole(int longest) const {
    group_.for_each(tiles_, [&](int tile) { parts_[tile] = ceil_div(tile_size(tile), longest); });
    group_.sync();
    int number = 0;
    for (int tile = 0; tile < tiles_; ++tile) number += parts_[tile];
    for_each_tile([&](int line, int tile, int start) {
      int first = line * number;
      for (int before = 0; before < tile; ++before) first += parts_[before];
      start += line * line_units_;
      const int size = tile_size(tile), parts = parts_[tile];
      for (int part = 0; part < parts; ++part) {
        write(first + part, start + size * part / parts, start + size * (part + 1) / parts, first);
      }
    });
    return number;
  }

  // Every line in equal ranges, whatever their tiles. Returns their number.
  __host__ __device__ int cut_evenly() const {
    const int number = smaller(ceil_div(line_units_, kMinRange), num_sms_);
    const auto cut = [&](int part) {
      return static_cast<int>(static_cast<int64_t>(line_units_) * part / number);
    };
    // The first part that is not cut in front of a unit.
    const auto part_from = [&](int unit) {
      return static_cast<int>((static_cast<int64_t>(unit) * number + line_units_ - 1) / line_units_);
    };
    for_each_tile([&](int line, int tile, int start) {
      const int end = start + tile_size(tile), first = line * number + part_from(start + 1) - 1;
      for (int part = part_from(start); part < number && cut(part) < end; ++part) {
        write(line * number + part, line * line_units_ + cut(part), line * line_units_ + cut(part + 1),
              first);
      }
    });
    return number;
  }

  __host__ __device__ void write(int sm, int begin, int end, int first) const {
    int32_t* out = p_.stretches + 4 * sm;
    out[0] = begin;
    out[1] = end;
    out[2] = first;
    out[3] = 0;
  }

  const AttentionPlanParams& p_;
  const int* tile_first_;
  int* parts_;
  const Group group_;
  int* scratch_;     // one integer that all threads see
  const int tiles_;  // of a head
  const int units_;  // of a head
  const int lines_;  // a head each, or a single one of all heads where there are fewer SMs
  const int line_tiles_;
  const int line_units_;
  const int num_sms_;  // of a line
};

}  // namespace bbk
