// The plan of a step's attention, which blockbatch_kernels/reference/attention_plan.py defines: pieces of
// keys, groups of rows and tiles of queries. One source for a CTA and for the host, as a group of one thread.
#pragma once

#include "attention/plan_units.cuh"

namespace bbk {

// Arrays between the steps of a plan. R rows, S segments, P pieces at most; a run is a stretch of segments
// with the same groups of rows, so there are no more runs than pieces.
struct Workspace {
  int* queries;         // [R] queries of a row; 0 where it takes no part
  int* length;          // [R] keys of a row; 0 where it takes no part
  int* owner;           // [S, R] first row of the request that reads the same pages; -1 where none is reached
  int* changed;         // [S] whether the groups differ from those of the segment before
  int* run_start;       // [P + 1] first segment, and behind the last run the number of segments
  int* run_tiles;       // [P] tiles in each piece of the run
  int* run_queries;     // [P] queries in each piece of the run
  int* row_offset;      // [P, R] place of a row's first query in query_order
  int* group_size;      // [P, R] queries of the group at its first row, 0 at other rows
  int* group_tile;      // [P, R] tiles of the groups before
  int* queries_before;  // [P, R] queries of the requests before, a request each
  int* tiles_before;    // [P, R] and tiles
  int* piece_run;       // [P]
  int* piece_start;     // [P] segments
  int* piece_end;       // [P]
  int* piece_tile;      // [P] tiles of the pieces before
  int* totals;          // [3] runs, pieces, tiles
  int* units;           // UnitPlanner's

  __host__ __device__ Workspace(int* memory, int64_t rows, int64_t segments, int64_t max_pieces) {
    auto take = [&memory](int64_t size) {
      int* array = memory;
      memory += size;
      return array;
    };
    queries = take(rows);
    length = take(rows);
    owner = take(segments * rows);
    changed = take(segments);
    run_start = take(max_pieces + 1);
    run_tiles = take(max_pieces);
    run_queries = take(max_pieces);
    row_offset = take(max_pieces * rows);
    group_size = take(max_pieces * rows);
    group_tile = take(max_pieces * rows);
    queries_before = take(max_pieces * rows);
    tiles_before = take(max_pieces * rows);
    piece_run = take(max_pieces);
    piece_start = take(max_pieces);
    piece_end = take(max_pieces);
    piece_tile = take(max_pieces);
    totals = take(3);
    units = memory;
  }

  static int64_t size(int64_t rows, int64_t segments, int64_t max_pieces) {
    return (2 + segments + 5 * max_pieces) * rows + segments + 7 * max_pieces + 4;
  }
};

// What all threads see at once.
struct PlanScratch {
  int lowest;
  int sums[2][kMaxTeams];
};

class Planner {
 public:
  __host__ __device__ Planner(const AttentionPlanParams& params, int* memory, const Group& group,
                              PlanScratch* scratch)
      : p_(params),
        w_(memory, params.num_rows, params.max_segments, params.max_pieces),
        group_(group),
        scratch_(scratch),
        rows_(params.num_rows),
        branches_(params.num_branches > 0 ? params.num_branches : larger(params.num_rows, 1)),
        requests_(ceil_div(params.num_rows, branches_)),
        segment_keys_(params.segment_pages * params.page_size) {}

  __host__ __device__ void plan_tiles() {
    read_rows();
    write_token_rows();
    find_owners();
    find_runs();
    lay_out_runs();
    cut_pieces();
    write_pieces();
    write_query_order();
  }

  __host__ __device__ void plan_units() {
    read_rows();
    find_owners();
    UnitPlanner(p_, w_.units, w_.owner, w_.length, segments_, group_, &scratch_->lowest).run();
  }

 private:
  template <typename Body>
  __host__ __device__ void for_each(int number, Body body) const {
    group_.for_each(number, body);
  }

  __host__ __device__ void read_rows() {
    int most = 0;
    for_each(rows_, [&](int row) {
      const int queries = p_.cu_seqlens_q[row + 1] - p_.cu_seqlens_q[row];
      // Lengths beyond the table are a caller's mistake: there is nothing to read.
      const int length = smaller(p_.seqlens_k[row], p_.pages_per_row * p_.page_size);
      const bool takes_part = queries > 0 && length > 0;
      w_.queries[row] = takes_part ? queries : 0;
      w_.length[row] = takes_part ? length : 0;
      most = larger(most, ceil_div(w_.length[row], segment_keys_));
    });
    segments_ = -group_.lowest(-most, &scratch_->lowest);
  }

  __host__ __device__ void write_token_rows() const {
    for_each(p_.num_tokens, [&](int token) { p_.token_row[token] = -1; });
    group_.sync();
    for (int row = group_.team(); row < rows_; row += group_.num_teams()) {
      const int first = p_.cu_seqlens_q[row];
      const int end = smaller(p_.num_tokens, first + w_.queries[row]);
      for (int token = first + group_.lane(); token < end; token += group_.num_lanes()) {
        p_.token_row[token] = row;
      }
    }
  }

  // Rows of a request stand together: [first, behind) of a row's.
  __host__ __device__ int first_row(int row) const { return row / branches_ * branches_; }
  __host__ __device__ int row_behind(int row) const { return smaller(first_row(row) + branches_, rows_); }

  // The key behind the last one that a row reads in a segment, or the segment's start or less.
  __host__ __device__ int end_in_segment(int row, int segment) const {
    return smaller((segment + 1) * segment_keys_, w_.length[row]);
  }

  __host__ __device__ void find_owners() {
    for_each(segments_ * rows_, [&](int index) {
      const int segment = index / rows_, row = index % rows_;
      const int end = end_in_segment(row, segment);
      int owner = -1;
      if (end > segment * segment_keys_) {
        const int first_page = segment * p_.segment_pages;
        const int num_pages = smaller(p_.pages_per_row, ceil_div(end, p_.page_size)) - first_page;
        const int32_t* pages = p_.page_table + row * p_.page_table_stride + first_page;
        for (owner = first_row(row); owner < row; ++owner) {
          if (end_in_segment(owner, segment) != end) continue;
          const int32_t* others = p_.page_table + owner * p_.page_table_stride + first_page;
          int same = 0;
          while (same < num_pages && pages[same] == others[same]) ++same;
          if (same == num_pages) break;
        }
      }
      w_.owner[index] = owner;
    });
    group_.sync();
  }

  __host__ __device__ void find_runs() {
    for_each(segments_, [&](int segment) { w_.changed[segment] = segment == 0; });
    group_.sync();
    for_each((segments_ - 1) * rows_, [&](int index) {
      if (w_.owner[index + rows_] == w_.owner[index]) return;
      group_.set_bits(reinterpret_cast<uint32_t*>(&w_.changed[index / rows_ + 1]), 1);
    });
    group_.sync();
    if (group_.rank() == 0) {
      int number = 0;
      for (int segment = 0; segment < segments_; ++segment) {
        if (!w_.changed[segment]) continue;
        if (number < p_.max_pieces) w_.run_start[number] = segment;
        ++number;
      }
      if (number <= p_.max_pieces) w_.run_start[number] = segments_;
      w_.totals[0] = number;
    }
    group_.sync();
    runs_ = w_.totals[0];
    if (runs_ > p_.max_pieces) join_runs();
  }

  // Too many runs: a single one, of rows that are in one group everywhere.
  __host__ __device__ void join_runs() {
    int* same = w_.row_offset;  // not in use yet
    for_each(rows_, [&](int row) {
      int owner = -1;
      if (w_.queries[row] > 0) {
        for (owner = first_row(row); owner < row; ++owner) {
          if (w_.queries[owner] == 0) continue;
          int segment = 0;
          while (segment < segments_ &&
                 w_.owner[segment * rows_ + owner] == w_.owner[segment * rows_ + row]) {
            ++segment;
          }
          if (segment == segments_) break;
        }
      }
      same[row] = owner;
    });
    group_.sync();
    for_each(rows_, [&](int row) { w_.owner[row] = same[row]; });
    if (group_.rank() == 0) {
      w_.run_start[0] = 0;
      w_.run_start[1] = segments_;
    }
    runs_ = 1;
    group_.sync();
  }

  // Groups stand in the order of their first row, rows of a group in their own order.
  __host__ __device__ void lay_out_runs() {
    for_each(runs_ * rows_, [&](int index) {
      const int row = index % rows_;
      const int* owner = owner_of_run(index / rows_);
      int before = 0, size = 0;  // of the request
      for (int other = first_row(row); other < row_behind(row); ++other) {
        if (owner[other] < 0) continue;
        const bool same = owner[other] == owner[row];
        if (owner[other] < owner[row] || (same && other < row)) before += w_.queries[other];
        if (same) size += w_.queries[other];
      }
      w_.row_offset[index] = before;
      w_.group_size[index] = owner[row] == row ? size : 0;
    });
    group_.sync();
    for_each(runs_ * requests_, [&](int index) {
      const int run = index / requests_, first = index % requests_ * branches_;
      int tiles = 0, queries = 0;
      for (int row = first; row < row_behind(first); ++row) {
        w_.group_tile[run * rows_ + row] = tiles;
        queries += w_.group_size[run * rows_ + row];
        tiles += ceil_div(w_.group_size[run * rows_ + row], p_.tile_tokens);
      }
      w_.queries_before[index] = queries;
      w_.tiles_before[index] = tiles;
    });
    group_.sync();
    for (int run = 0; run < runs_; ++run) {
      const int queries = add_up(w_.queries_before + run * requests_, scratch_->sums[0]);
      const int tiles = add_up(w_.tiles_before + run * requests_, scratch_->sums[1]);
      if (group_.rank() == 0) w_.run_queries[run] = queries, w_.run_tiles[run] = tiles;
    }
    group_.sync();
    for_each(runs_ * rows_, [&](int index) {
      const int request = index / rows_ * requests_ + index % rows_ / branches_;
      w_.row_offset[index] += w_.queries_before[request];
      w_.group_tile[index] += w_.tiles_before[request];
    });
    group_.sync();
  }

  __host__ __device__ const int* owner_of_run(int run) const { return w_.owner + w_.run_start[run] * rows_; }

  // Group: turns a number for each request into the sum of those before it; returns the sum of all. Between
  // two calls with the same sums stands one with others.
  __host__ __device__ int add_up(int* numbers, int* sums) const {
    int before = 0;
    for (int base = 0; base < requests_; base += group_.size()) {
      const int request = base + group_.rank();
      int total = 0;
      const int own = request < requests_ ? numbers[request] : 0;
      const int below = before + group_.sum_below(own, sums, &total);
      if (request < requests_) numbers[request] = below;
      before += total;
      group_.sync();
    }
    return before;
  }

  __host__ __device__ int run_length(int run) const { return w_.run_start[run + 1] - w_.run_start[run]; }

  __host__ __device__ int longest_piece(int parts) const {
    return larger(ceil_div(segments_, parts), p_.min_segments);
  }

  __host__ __device__ int count_pieces(int parts, int* tiles) const {
    int pieces = 0;
    *tiles = 0;
    for (int run = 0; run < runs_; ++run) {
      const int number = ceil_div(run_length(run), longest_piece(parts));
      pieces += number;
      *tiles += number * w_.run_tiles[run];
    }
    return pieces;
  }

  // Cuts finer while there are fewer tiles than wanted and room for more pieces.
  __host__ __device__ void cut_pieces() {
    int tiles;
    int stop = INT_MAX;
    for (int parts = 1 + group_.rank(); parts <= segments_ && stop == INT_MAX; parts += group_.size()) {
      const bool too_many = count_pieces(parts, &tiles) > p_.max_pieces;
      if (too_many || tiles >= p_.target_tiles || longest_piece(parts) == p_.min_segments) stop = parts;
    }
    int parts = smaller(segments_, group_.lowest(stop, &scratch_->lowest));
    if (parts > 1 && count_pieces(parts, &tiles) > p_.max_pieces) --parts;
    const int longest = parts > 0 ? longest_piece(parts) : 1;

    for_each(runs_, [&](int run) {
      int piece = 0, tile = 0;
      for (int before = 0; before < run; ++before) {
        const int number = ceil_div(run_length(before), longest);
        piece += number;
        tile += number * w_.run_tiles[before];
      }
      const int start = w_.run_start[run], length = run_length(run);
      const int number = ceil_div(length, longest);
      for (int part = 0; part < number; ++part) {
        w_.piece_run[piece] = run;
        w_.piece_start[piece] = start + length * part / number;
        w_.piece_end[piece] = start + length * (part + 1) / number;
        w_.piece_tile[piece] = tile;
        ++piece;
        tile += w_.run_tiles[run];
      }
      if (run == runs_ - 1) {
        w_.totals[1] = piece;
        w_.totals[2] = tile;
      }
    });
    group_.sync();
    pieces_ = runs_ > 0 ? w_.totals[1] : 0;
    tiles_ = runs_ > 0 ? w_.totals[2] : 0;
  }

  __host__ __device__ void write_tile(int tile, int piece, int first, int number, int row) const {
    int32_t* out = p_.tiles + 4 * static_cast<int64_t>(tile);
    out[0] = piece;
    out[1] = first;
    out[2] = number;
    out[3] = row;
  }

  __host__ __device__ void write_pieces() const {
    for_each(p_.max_pieces, [&](int piece) {
      p_.pieces[2 * piece] = piece < pieces_ ? w_.piece_start[piece] * segment_keys_ : 0;
      p_.pieces[2 * piece + 1] = piece < pieces_ ? w_.piece_end[piece] * segment_keys_ : 0;
    });
    for_each(pieces_ * rows_, [&](int index) {
      const int piece = index / rows_, row = index % rows_;
      const int in_run = w_.piece_run[piece] * rows_ + row;
      int tile = w_.piece_tile[piece] + w_.group_tile[in_run];
      const int size = w_.group_size[in_run];
      for (int first = 0; first < size && tile < p_.max_tiles; first += p_.tile_tokens) {
        const int number = smaller(size - first, p_.tile_tokens);
        write_tile(tile++, piece, w_.row_offset[in_run] + first, number, row);
      }
    });
    for_each(p_.max_tiles - tiles_, [&](int tile) { write_tile(tiles_ + tile, 0, 0, 0, 0); });
    if (group_.rank() == 0) {
      p_.counts[0] = tiles_;
      p_.counts[1] = pieces_;
    }
  }

  __host__ __device__ void write_query_order() const {
    for_each(p_.num_tokens, [&](int token) {
      const int row = p_.token_row[token];
      const int in_row = row < 0 ? 0 : token - p_.cu_seqlens_q[row];
      int32_t* order = p_.query_order;
      for (int piece = 0; piece < p_.max_pieces; ++piece, order += p_.num_tokens) {
        const int run = piece < pieces_ ? w_.piece_run[piece] : 0;
        if (piece >= pieces_ || token >= w_.run_queries[run]) order[token] = -1;
        if (piece >= pieces_ || row < 0 || owner_of_run(run)[row] < 0) continue;
        order[w_.row_offset[run * rows_ + row] + in_row] = token;
      }
    });
  }

  const AttentionPlanParams& p_;
  const Workspace w_;
  const Group group_;
  PlanScratch* scratch_;
  const int rows_;
  const int branches_;  // rows of a request
  const int requests_;
  const int segment_keys_;
  int segments_ = 0;
  int runs_ = 0;
  int pieces_ = 0;
  int tiles_ = 0;
};

}  // namespace bbk
