// Where keys lie: a stretch of positions in a stretch of cells.

#pragma once

#include <cstdint>

// keys [pos, pos + n) lie in cells [cell, cell + n)
struct lminf_run {
    int64_t pos;
    int64_t cell;
    int64_t n;
};
