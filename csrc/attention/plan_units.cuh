// The units of a plan, which blockbatch_kernels/reference/attention_units.py defines. A unit is one iteration
// of the stream-K kernel (stream_k.cu): up to kUnitKeys keys, for the tokens of a tile that read them. The
// units of a tile follow each other, and those of all tiles are what is shared out.
#pragma once

#include "attention/plan_ranges.cuh"
#include "attention/work_tiles.cuh"

namespace bbk {

class UnitPlanner {
 public:
  // owner: [segments, rows] first row that reads the same pages; -1 where a row does not reach.
  // length: [rows] keys; 0 where a row takes no part.
  __host__ __device__ UnitPlanner(const AttentionPlanParams& params, int* memory, const int* owner,
                                  const int* length, int segments, const Group& group, int* scratch)
      : p_(params),
        owner_(owner),
        length_(length),
        group_(group),
        scratch_(scratch),
        segments_(segments),
        segment_keys_(params.segment_pages * params.page_size) {
    const int most = most_blocks(params.num_tokens, params.num_rows, params.block_tokens);
    auto take = [&memory](int size) {
      int* array = memory;
      memory += size;
      return array;
    };
    block_first_ = take(most);
    block_size_ = take(most);
    part_row_ = take(most);
    part_tile_ = take(most);
    tile_part_ = take(most + 1);
    tile_first_ = take(most + 1);
    tile_parts_ = take(most);
    totals_ = take(3);
    sums_ = take(kMaxTeams);
    place_ = take(most * params.max_segments + 1);
  }

  static int64_t workspace(int num_tokens, int num_rows, int block_tokens, int max_segments) {
    const int64_t most = most_blocks(num_tokens, num_rows, block_tokens);
    return 7 * most + 6 + kMaxTeams + most * max_segments;
  }

  __host__ __device__ void run() {
    if (group_.rank() == 0) lay_out_blocks();
    group_.sync();
    blocks_ = totals_[0];
    parts_ = totals_[1];
    tiles_ = (blocks_ + 1) / 2;
    count_units();
    add_up();
    write();
    WorkRangePlanner(p_, tile_first_, tiles_, tile_parts_, group_, scratch_).run();
  }

 private:
  // Also of the parts: a row adds at most one block that is not full to its full ones, and an empty one.
  __host__ __device__ static int most_blocks(int num_tokens, int num_rows, int block_tokens) {
    return num_tokens / block_tokens + 2 * num_rows;
  }

  __host__ __device__ int first_token(int row) const { return p_.cu_seqlens_q[row]; }
  __host__ __device__ int end_token(int row) const {
    return smaller(p_.num_tokens, p_.cu_seqlens_q[row + 1]);
  }

  // Serial, since every block starts where the one before it ends.
  __host__ __device__ void lay_out_blocks() {
    int block = -1, part = 0, first = 0, end = 0;  // of the current block
    int previous = -1;                             // row
    const auto start_block = [&](int token, int stop) {
      first = token;
      end = stop;
      ++block;
      block_first_[block] = first;
      block_size_[block] = end - first;
    };
    const auto add_part = [&](int row) {
      const int tile = block / 2;
      if (part > 0 && part_row_[part - 1] == row && part_tile_[part - 1] == tile) return;
      if (part == 0 || part_tile_[part - 1] != tile) tile_part_[tile] = part;
      part_row_[part] = row;
      part_tile_[part] = tile;
      ++part;
    };
    for (int row = 0; row < p_.num_rows; ++row) {
      if (length_[row] == 0) continue;
      int token = first_token(row);
      const int stop = end_token(row);
      if (token >= stop) continue;
      const bool shares = previous >= 0 && owner_[row] == owner_[previous];  // of the first segment
      previous = row;
      if (shares && end == token && stop - first <= p_.block_tokens) {
        end = stop;
        block_size_[block] = end - first;
        add_part(row);
        continue;
      }
      if (!shares && stop - token > p_.block_tokens && block % 2 == 0) start_block(token, token);
      while (token < stop) {
        start_block(token, smaller(stop, token + p_.block_tokens));
        add_part(row);
        token = end;
      }
    }
    totals_[0] = block + 1;
    totals_[1] = part;
    tile_part_[block / 2 + (block >= 0)] = part;
  }

  // A part's place in a segment of its tile.
  __host__ __device__ int place(int part, int segment) const {
    const int begin = tile_part_[part_tile_[part]], end = tile_part_[part_tile_[part] + 1];
    return begin * segments_ + segment * (end - begin) + part - begin;
  }

  __host__ __device__ int owner(int part, int segment) const {
    return owner_[segment * p_.num_rows + part_row_[part]];
  }

  __host__ __device__ int num_keys(int part, int segment) const {
    const int end = smaller(p_.pages_per_row * p_.page_size,
                            smaller((segment + 1) * segment_keys_, length_[part_row_[part]]));
    return larger(0, end - segment * segment_keys_);
  }

  // The first part of a group in its tile has the group's units.
  __host__ __device__ bool leads(int part, int segment) const {
    if (owner(part, segment) < 0) return false;
    for (int other = tile_part_[part_tile_[part]]; other < part; ++other) {
      if (owner(other, segment) == owner(part, segment)) return false;
    }
    return true;
  }

  __host__ __device__ void count_units() const {
    group_.for_each(parts_ * segments_, [&](int index) {
      const int part = index / segments_, segment = index % segments_;
      const int number = leads(part, segment) ? ceil_div(num_keys(part, segment), kUnitKeys) : 0;
      place_[place(part, segment)] = number;
    });
    group_.sync();
  }

  // Turns numbers into the units in front of each place.
  __host__ __device__ void add_up() const {
    const int number = parts_ * segments_;
    const int each = larger(1, ceil_div(number, group_.size()));
    const int first = smaller(group_.rank() * each, number), end = smaller(first + each, number);
    int sum = 0, total = 0;
    for (int i = first; i < end; ++i) sum += place_[i];
    int before = group_.sum_below(sum, sums_, &total);
    for (int i = first; i < end; ++i) {
      const int here = place_[i];
      place_[i] = before;
      before += here;
    }
    if (group_.rank() == 0) place_[number] = total;
    group_.sync();
    group_.for_each(tiles_ + 1, [&](int tile) { tile_first_[tile] = place_[tile_part_[tile] * segments_]; });
    group_.sync();
  }

  // A bit for each token of a block that is one of the row's.
  __host__ __device__ uint64_t mask(int block, int row) const {
    if (block >= blocks_) return 0;
    const int start = block_first_[block];
    const int first = larger(start, first_token(row));
    const int end = start + block_size_[block];
    const int last = smaller(end_token(row), end);
    if (last <= first) return 0;
    return ~0ull >> (64 - (last - first)) << (first - start);
  }

  // Whether the part's tile alone reads its keys of the segment. Parts of a request stand together.
  __host__ __device__ bool is_read_once(int part, int segment) const {
    const auto reads_too = [&](int other) {
      return part_tile_[other] != part_tile_[part] && owner(other, segment) == owner(part, segment);
    };
    for (int other = part - 1; other >= 0 && of_one_request(other, part); --other) {
      if (reads_too(other)) return false;
    }
    for (int other = part + 1; other < parts_ && of_one_request(other, part); ++other) {
      if (reads_too(other)) return false;
    }
    return true;
  }

  __host__ __device__ bool of_one_request(int a, int b) const {
    return p_.num_branches == 0 || part_row_[a] / p_.num_branches == part_row_[b] / p_.num_branches;
  }

  __host__ __device__ void write() const {
    const int total = place_[parts_ * segments_];
    auto* records = reinterpret_cast<AttentionUnit*>(p_.units);
    group_.for_each(2 * p_.processors, [&](int i) { p_.arrivals[i] = 0; });
    constexpr int kIntegers = sizeof(AttentionUnit) / sizeof(int32_t);
    group_.for_each(kIntegers, [&](int i) { p_.units[i] = i == 0 ? total : 0; });
    group_.for_each((p_.max_units - 1 - total) * kIntegers,
                    [&](int i) { p_.units[(1 + total) * kIntegers + i] = 0; });
    group_.for_each(parts_ * segments_, [&](int index) {
      const int part = index / segments_, segment = index % segments_;
      if (!leads(part, segment)) return;
      const int tile = part_tile_[part];
      AttentionUnit unit = {};
      unit.tile_begin = tile_first_[tile];
      unit.tile_end = tile_first_[tile + 1];
      for (int i = 0; i < 2; ++i) {
        const int block = 2 * tile + i;
        unit.first_token[i] = block < blocks_ ? block_first_[block] : 0;
        unit.num_tokens[i] = block < blocks_ ? block_size_[block] : 0;
      }
      for (int other = part; other < tile_part_[tile + 1]; ++other) {
        if (owner(other, segment) != owner(part, segment)) continue;
        for (int i = 0; i < 2; ++i) unit.tokens[i] |= mask(2 * tile + i, part_row_[other]);
      }
      unit.read_once = is_read_once(part, segment);
      const int32_t* pages = p_.page_table + part_row_[part] * p_.page_table_stride;
      const int keys = num_keys(part, segment), step = box_keys(p_.page_size);
      int number = place_[place(part, segment)];
      for (int first = 0; first < keys; first += kUnitKeys, ++number) {
        const int key = segment * segment_keys_ + first;
        unit.num_keys = smaller(keys - first, kUnitKeys);
        unit.first_slot = key % p_.page_size;
        for (int i = 0; i < 8; ++i) {
          unit.pages[i] = i * step < unit.num_keys ? pages[(key + i * step) / p_.page_size] : 0;
        }
        records[1 + number] = unit;
      }
    });
  }

  const AttentionPlanParams& p_;
  const int* owner_;
  const int* length_;
  const Group group_;
  int* scratch_;  // one integer that all threads see
  const int segments_;
  const int segment_keys_;
  int* block_first_;  // [blocks] packed token
  int* block_size_;   // [blocks]
  int* part_row_;     // a part: a row's tokens in a tile
  int* part_tile_;
  int* tile_part_;   // [tiles + 1] first part
  int* tile_first_;  // [tiles + 1] units in front
  int* tile_parts_;  // WorkRangePlanner's
  int* totals_;      // blocks, parts
  int* sums_;
  int* place_;  // [parts * segments + 1], by tile, segment and part: units, then units in front
  int blocks_ = 0;
  int parts_ = 0;
  int tiles_ = 0;
};

}  // namespace bbk
