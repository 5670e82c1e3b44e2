"""The bugs that plant.py plants: typical errors of such kernels, each wherever it can occur."""

from __future__ import annotations

ORDER = ("race", "plain")  # builds in which a bug in the order of threads is tried
VALUE = ("plain", "sanitized")

# (regular expression, replacement, builds to try): one bug for each match in every file
PATTERNS = [
    (r"\b\w+\.sync\(\);", r";", ORDER),
    (r"__syncthreads\(\);", r";", ORDER),
    (r"__syncwarp\(\);", r";", ORDER),
    (r"wait_copies<\d>\(\);", r";", ORDER),
    (r"wait_copies<0>", r"wait_copies<1>", ORDER),
    (r"wait_copies<1>", r"wait_copies<2>", ORDER),
    (r"commit_copies\(\);", r";", ORDER),
    (r"wait_for_previous_kernel\(\);", r";", ORDER),
    (r"load_matrices_transposed\(", r"load_matrices(", VALUE),
    # swap the middle two of the four registers of a left operand, or the two of a right one
    (r"\{([^{},]+), ([^{},]+), ([^{},]+), ([^{},]+)\}, \{f", r"{\1, \3, \2, \4}, {f", VALUE),
    (r"\{(f\[\d\]), (f\[\d\])\}", r"{\2, \1}", VALUE),
    # wrong lanes of a fragment
    (r"lane\.t \* 2\b", r"lane.t * 2 % 6", VALUE),
    (r"lane\.g \+ 8\b", r"lane.g + 7", VALUE),
    # off by one at the edges of the data
    (r"\bc < (terms|m)\b", r"c <= \1", VALUE),
    (r"\brow < valid\b", r"row <= valid", VALUE),
    (r"\bto < valid\b", r"to <= valid", VALUE),
]

# (file, text, replacement[, index of the occurrence of the text])
BUGS = [
    ("backward.cu", "pass.load(next, stage ^ 1)", "pass.load(next, stage)"),
    ("backward.cu", "stage ^= 1;", ";"),
    ("backward.cu", "int64_t next = tile + gridDim.x", "int64_t next = tile + 1"),
    ("backward.cu", "remaining < s.rows() ? static_cast<int>(remaining) : s.rows()", "s.rows()", 0),
    ("backward.cu", "remaining < s.rows() ? static_cast<int>(remaining) : s.rows()", "s.rows()", 1),
    ("backward.cu", "all * (split + 1) / b.splits", "all * (split + 1) / b.splits - split"),
    ("backward.cu", "ones.first[(m + row % n)", "ones.first[(m + row / n)"),
    ("backward.cu", "clear(b.left_sums, b.tile);", "clear(b.right_sums, b.tile);"),
    ("backward.cu", "clear(b.left_sums, b.tile);", "clear(b.left_sums, b.bias_sums);"),
    ("backward.cu", "clear(b.v_parts, ", "clear(b.dz_parts, "),
    ("backward.cu", "blockIdx.x * b.row", "blockIdx.x * (b.row - 1)"),
    ("backward.cu", "sum * b.factors.scale", "sum", 0),
    ("backward.cu", "sum * b.factors.scale", "sum", 1),
    ("columns.h", "value[e / 2][2 * j + e % 2]", "value[e % 2][2 * j + e / 2]"),
    ("columns.h", "sum[j / 2][half * 2 + j % 2]", "sum[j / 2][half + j % 2 * 2]"),
    ("columns.h", "value[half]), width - column,", "value[half]), width - column + 1,"),
    ("columns.h", "row < valid ? width - column : 0", "row < valid ? width - column + 1 : 0"),
    ("columns.h", "if (step >= steps) break;", ";", 0),
    ("columns.h", "if (step >= steps) break;", ";", 1),
    ("columns.h", "if (step >= steps) break;", ";", 2),
    ("columns.h", "if (column >= columns) break;", ";"),
    ("columns.h", "T::parts == 3 ? apart : sum[column]", "sum[column]"),
    ("columns.h", "if (first + j < end)", "", 0),
    ("columns.h", "if (first + j >= end) break;", ";"),
    ("forward.cu", "all_rows - first < rows ? static_cast<int>(all_rows - first) : rows", "rows"),
    ("forward.cu", "f.scratch + index * f.scratch_bytes", "f.scratch"),
    ("forward.cu", "static_cast<int64_t>(gridDim.x) * warps * rows", "static_cast<int64_t>(gridDim.x) * rows"),
    ("fragments.h", "segments(width) * segment + 8", "segments(width) * segment"),
    ("fragments.h", "step ? c - 8 : 0", "0"),
    ("fragments.h", "if (c >= terms) break;", ";"),
    ("fragments.h", "u + 1 < width ? asked[j][1]", "u < width ? asked[j][1]"),
    ("fragments.h", "u + 1 < width ? u + 1 : width - 1", "u + 1"),
    ("fragments.h", "u % 8 / 2 * 8 + u % segment / 8 * 2", "u % 8 / 2 * 2 + u % segment / 8 * 8"),
    ("gradients.h", "if (at < 0) continue;", ";", 0),
    ("gradients.h", "if (first + j >= columns) break;", ";"),
    ("gradients.h", "lane.index / 16 * 8", "(lane.index / 8 & 1) * 8", 0),
    ("gradients.h", "lane.index / 16 * 8", "(lane.index / 8 & 1) * 8", 1),
    ("gradients.h", "(at + 8)", "(at + 6)"),
    ("gradients.h", " && u + j / 2 * 8 < width", ""),
    ("kernels.h", "(wanted + 15) / 16 * 16", "wanted"),
    ("launch.cu", "aligned(x)", "true", 0),
    ("launch.cu", "aligned(x)", "true", 1),
    ("launch.cu", "aligned(out)", "true"),
    ("launch.cu", " && aligned(residual)", ""),
    ("launch.cu", " && aligned(grad_x)", ""),
    ("launch.cu", "aligned(grad_out)", "true"),
    ("launch.cu", "reduce.rows = l.blocks", "reduce.rows = l.blocks - 1"),
    ("middle.h", "* count; e += team.size", "* count - 1; e += team.size"),
    ("middle.h", "rank - by + size", "rank - by + size - 1"),
    ("plan.cu", "s.in % 8 == 0", "s.in % 4 == 0"),
    ("plan.cu", "s.out % 8 == 0", "s.out % 4 == 0"),
    ("plan.cu", "f.scratch_bytes = warp.bytes", "f.scratch_bytes = warp.bytes - 16"),
    ("plan.cu", "room.take(sums(s.in, s.m))", "room.take(sums(s.in, s.m) - 16)"),
    ("plan.cu", "room.take(sums(s.out, right_terms))", "room.take(sums(s.out, right_terms) - 16)"),
    ("plan.cu", "b.part_stride = s.rows() + 8", "b.part_stride = s.rows() - 8"),
    ("reduce.cu", "if (column < r.begin[r.count])", ""),
    ("reduce.cu", "group != 0 || ", ""),
    ("reduce.cu", " || column >= r.begin[r.count]", ""),
    ("reduce.cu", " && r.gradient[j].data", ""),
    ("reduce.cu", "column < r.begin[j + 1]", "column <= r.begin[j + 1]"),
    ("tile.h", "segment * static_cast<int>(sizeof(T)) + 16", "segment * static_cast<int>(sizeof(T))"),
    ("tile.h", " && column < width", ""),
    ("tile.h", "row < valid ? width - column : 0", "row < valid ? width - column + 1 : 0"),
]

# name of a bug: the reason why the kernels are right with it too
HARMLESS = {
    "columns.h: if (step >= steps) break; -> nothing #1": "zeros that expand() leaves out",
    "forward.cu: static_cast<int64_t>(gridDim.x) * warps * rows -> static_cast<int64_t>(gridDim.x) * rows #0": (
        "tiles are computed several times over, each time the same"
    ),
}
