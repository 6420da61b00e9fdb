// The attention kernel against a naive one in float64, and against ggml's: what it computes, how exactly, and that its
// bits depend on nothing but the query and what it sees.

#include "check.h"

#include "lminf-attention.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <string>
#include <vector>

namespace {

// ---- rows of all types, written and read without ggml ----

double from_f16(uint16_t x) {
    const int    exponent  = x >> 10 & 31;
    const double mantissa  = x & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
        : exponent                          ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return x >> 15 ? -magnitude : magnitude;
}

// the nearest; no number here is larger than half precision's largest
uint16_t to_f16(float x) {
    const float magnitude = std::fabs(x);
    uint16_t    res       = 0;
    for (int bit = 14; bit >= 0; --bit) {
        if (from_f16(res | 1 << bit) <= magnitude) {
            res |= 1 << bit;
        }
    }
    if (magnitude - from_f16(res) > from_f16(res + 1) - magnitude) {
        res++;
    }
    return res | (x < 0 ? 0x8000 : 0);
}

int64_t row_size(ggml_type type, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32: return 4 * n;
        case GGML_TYPE_Q8_0: return n / 32 * 34;
        case GGML_TYPE_Q4_0: return n / 32 * 18;
        default: return 2 * n;
    }
}

// 32 numbers, or fewer of a plain type
void pack_unit(ggml_type type, const float * x, int64_t n, char * dst) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        largest = std::fabs(x[i]) > std::fabs(largest) ? x[i] : largest;
    }
    const float    d      = type == GGML_TYPE_Q8_0 ? std::fabs(largest) / 127 : -largest / 8;
    const uint16_t factor = to_f16(d);
    const auto     number = [&](int64_t i) { return d == 0.0f ? 0 : (int)std::lround(x[i] / d); };
    if (type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0) {
        memcpy(dst, &factor, 2);
    }
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        const uint16_t half  = to_f16(x[i]);
        const uint16_t brain = (uint16_t)(bits >> 16);
        switch (type) {
            case GGML_TYPE_F32: memcpy(dst + 4 * i, x + i, 4); break;
            case GGML_TYPE_F16: memcpy(dst + 2 * i, &half, 2); break;
            case GGML_TYPE_BF16: memcpy(dst + 2 * i, &brain, 2); break;
            case GGML_TYPE_Q8_0: dst[2 + i] = (char)number(i); break;
            default:
                if (i < 16) {
                    dst[2 + i] = (char)(std::min(number(i) + 8, 15) | std::min(number(i + 16) + 8, 15) << 4);
                }
        }
    }
}

double unpacked(ggml_type type, const char * row, int64_t i) {
    uint16_t half;
    memcpy(&half, row + (type == GGML_TYPE_Q8_0 ? i / 32 * 34 : type == GGML_TYPE_Q4_0 ? i / 32 * 18 : 2 * i), 2);
    const uint32_t bits = (uint32_t)half << 16;
    float          x    = 0.0f;
    const uint8_t  byte = (uint8_t)row[i / 32 * 18 + 2 + i % 16];
    switch (type) {
        case GGML_TYPE_F32: memcpy(&x, row + 4 * i, 4); return x;
        case GGML_TYPE_F16: return from_f16(half);
        case GGML_TYPE_BF16: memcpy(&x, &bits, 4); return x;
        case GGML_TYPE_Q8_0: return from_f16(half) * (int8_t)row[i / 32 * 34 + 2 + i % 32];
        default: return from_f16(half) * ((i % 32 < 16 ? byte & 15 : byte >> 4) - 8);
    }
}

// ---- a scene: what there is to see, by position; and ways to lay it out and ask for it ----

struct shape {
    ggml_type type_k    = GGML_TYPE_F32;
    ggml_type type_v    = GGML_TYPE_F32;
    int64_t   n_embd_k  = 64;
    int64_t   n_embd_v  = 64;
    int64_t   n_head    = 4;
    int64_t   n_head_kv = 2;
    int64_t   n_sink    = 4;
    int64_t   n_window  = 300;
    int64_t   n_clamp   = 0; // > 0: sink tokens farther than that are far ones
    int64_t   first     = 0; // position of the first query
    int64_t   n_tokens  = 1;
    int64_t   n_streams = 1;
    bool      gaps      = false;
    float     softcap   = 0.0f;
    bool      slopes    = false;
    bool      logits    = false;
    bool      parts     = false;
};

struct scene {
    shape   s;
    int64_t first_key; // of the window of the first query
    int64_t n_keys;    // sink tokens, then all window keys

    std::vector<std::vector<char>>     k, v, far_k; // of each stream, [key][head]
    std::vector<float>                 q, q_far;
    std::vector<float>                 slopes, logits;
    std::vector<lminf_attention_query> queries; // one stream after the other

    explicit scene(const shape & shape_) : s(shape_) {
        std::mt19937                    random(7);
        std::normal_distribution<float> normal;
        const auto                      numbers = [&](int64_t n, float factor) {
            std::vector<float> res(n);
            for (auto & x : res) {
                x = normal(random) * factor;
            }
            return res;
        };
        const auto rows = [&](ggml_type type, int64_t n_rows, int64_t n) {
            std::vector<char> res(n_rows * row_size(type, n));
            const auto        all = numbers(n_rows * n, 1.0f);
            for (int64_t i = 0; i < n_rows; ++i) {
                for (int64_t j = 0; j < n; j += 32) {
                    pack_unit(type, all.data() + i * n + j, std::min<int64_t>(n - j, 32),
                        res.data() + i * row_size(type, n) + row_size(type, j));
                }
            }
            return res;
        };
        first_key = std::max(s.n_sink, s.first - s.n_window + 1);
        n_keys    = s.n_sink + s.first + s.n_tokens - first_key;
        for (int64_t i = 0; i < s.n_streams; ++i) {
            k.push_back(rows(s.type_k, n_keys * s.n_head_kv, s.n_embd_k));
            v.push_back(rows(s.type_v, n_keys * s.n_head_kv, s.n_embd_v));
            far_k.push_back(rows(s.type_k, s.n_sink * s.n_head_kv, s.n_embd_k));
            for (int64_t j = 0; j < s.n_tokens; ++j) {
                const int64_t pos = s.first + j;
                const int64_t far = s.n_clamp > 0 ? std::clamp<int64_t>(pos - s.n_clamp, 0, s.n_sink) : 0;
                queries.push_back({(int32_t)i, pos, far, std::min(s.n_sink, pos + 1),
                    std::max(s.n_sink, pos - s.n_window + 1), std::max(s.n_sink, pos + 1)});
            }
        }
        q      = numbers(queries.size() * s.n_head * s.n_embd_k, 1.5f);
        q_far  = numbers(queries.size() * s.n_head * s.n_embd_k, 1.5f);
        slopes = numbers(s.n_head, 0.01f);
        logits = numbers(s.n_head, 3.0f);
    }

    int64_t index(int64_t pos) const { return pos < s.n_sink ? pos : s.n_sink + pos - first_key; }

    bool there(int64_t pos) const { return !s.gaps || pos < s.n_sink || (pos / 7 % 5 != 0 && pos / 41 % 3 != 0); }

    float   scale() const { return 1.0f / std::sqrt((float)s.n_embd_k); }
    int64_t alibi_clamp() const { return s.n_clamp > 0 ? s.n_clamp : 100; }
    int64_t n_row() const { return s.n_head * (s.n_embd_v + (s.parts ? 2 : 0)); }

    // a query's result in float64; `magnitude` of what is summed
    std::vector<double> expected(int64_t i_query) const {
        const auto &        query = queries[i_query];
        std::vector<double> res;
        for (int64_t head = 0; head < s.n_head; ++head) {
            const int64_t        head_kv = head / (s.n_head / s.n_head_kv);
            std::vector<int64_t> seen;
            for (int64_t pos = 0; pos < query.end; ++pos) {
                if (pos < query.sinks || (pos >= query.begin && there(pos))) {
                    seen.push_back(pos);
                }
                pos = pos + 1 == query.sinks && query.begin > pos ? query.begin - 1 : pos;
            }
            std::vector<double> x;
            for (const int64_t pos : seen) {
                const bool   far = pos < query.sinks_far;
                const char * row = (far ? far_k : k)[query.stream].data() +
                    (index(pos) * s.n_head_kv + head_kv) * row_size(s.type_k, s.n_embd_k);
                const float * vec   = (far ? q_far : q).data() + (i_query * s.n_head + head) * s.n_embd_k;
                double        logit = 0.0;
                for (int64_t i = 0; i < s.n_embd_k; ++i) {
                    logit += vec[i] * unpacked(s.type_k, row, i);
                }
                logit *= scale();
                logit = s.softcap != 0.0f ? s.softcap * std::tanh(logit / s.softcap) : logit;
                logit -= s.slopes ? slopes[head] * (double)std::min(query.pos - pos, alibi_clamp()) : 0.0;
                x.push_back(logit);
            }
            double max = s.logits ? logits[head] : -INFINITY;
            for (const double logit : x) {
                max = std::max(max, logit);
            }
            double              sum = s.logits ? std::exp(logits[head] - max) : 0.0;
            std::vector<double> values(s.n_embd_v);
            for (size_t j = 0; j < seen.size(); ++j) {
                const double weight = std::exp(x[j] - max);
                const char * row =
                    v[query.stream].data() + (index(seen[j]) * s.n_head_kv + head_kv) * row_size(s.type_v, s.n_embd_v);
                sum += weight;
                for (int64_t i = 0; i < s.n_embd_v; ++i) {
                    values[i] += weight * unpacked(s.type_v, row, i);
                }
            }
            for (const double value : values) {
                res.push_back(s.parts || sum == 0.0 ? value : value / sum);
            }
            if (s.parts) {
                res.push_back(max);
                res.push_back(sum);
            }
        }
        return res;
    }
};

struct way {
    int     n_threads = 1;
    int64_t n_tile    = 1 << 20; // queries in a job
    int64_t n_run     = 1 << 20; // longest run
    int     seed      = 0;       // > 0: runs lie in any order, with garbage around
};

// a scene in cells
struct cells {
    const scene &                       all;
    std::vector<std::vector<char>>      k, v;
    std::vector<std::vector<lminf_run>> runs;
    std::vector<lminf_attention_stream> streams;

    cells(const scene & scene_, const way & how) : all(scene_), runs(all.s.n_streams) {
        const auto & s = all.s;
        std::mt19937 random(how.seed);
        for (int64_t i = 0; i < s.n_streams; ++i) {
            for (int64_t pos = all.first_key; pos < s.first + s.n_tokens; ++pos) {
                if (!all.there(pos)) {
                    continue;
                }
                auto & some = runs[i];
                if (some.empty() || some.back().pos + some.back().n < pos || some.back().n >= how.n_run) {
                    some.push_back({pos, 0, 0});
                }
                some.back().n++;
            }
            std::vector<size_t> order(runs[i].size());
            for (size_t j = 0; j < order.size(); ++j) {
                order[j] = j;
            }
            if (how.seed) {
                std::shuffle(order.begin(), order.end(), random);
            }
            int64_t cell = s.n_sink;
            for (const size_t j : order) {
                cell += how.seed ? random() % 3 : 0;
                runs[i][j].cell = cell;
                cell += runs[i][j].n;
            }
            k.push_back(place(i, all.k[i], s.type_k, s.n_embd_k, cell));
            v.push_back(place(i, all.v[i], s.type_v, s.n_embd_v, cell));
        }
        for (int64_t i = 0; i < s.n_streams; ++i) {
            const auto rows = [&](const std::vector<char> & data, ggml_type type, int64_t n) {
                return lminf_rows{
                    type, data.data(), (size_t)(s.n_head_kv * row_size(type, n)), (size_t)row_size(type, n)};
            };
            streams.push_back({rows(k[i], s.type_k, s.n_embd_k), rows(v[i], s.type_v, s.n_embd_v),
                rows(all.far_k[i], s.type_k, s.n_embd_k), runs[i].data(), (int64_t)runs[i].size()});
        }
    }

    // cells that nobody sees are full of NaN
    std::vector<char> place(
        int64_t stream, const std::vector<char> & rows, ggml_type type, int64_t n_embd, int64_t n_cells) const {
        const int64_t     size = all.s.n_head_kv * row_size(type, n_embd);
        std::vector<char> res(n_cells * size, (char)0xff);
        memcpy(res.data(), rows.data(), all.s.n_sink * size);
        for (const auto & run : runs[stream]) {
            memcpy(res.data() + run.cell * size, rows.data() + all.index(run.pos) * size, run.n * size);
        }
        return res;
    }
};

void compute(const lminf_attention_job & job, int n_threads, void * work, size_t n_bytes) {
    lminf_attention_plan plan;
    plan.make(job, n_threads);
    CHECK(plan.work_size(job) <= n_bytes);
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back([&, i] { lminf_attention_compute(job, plan, i, n_threads, work); });
    }
    lminf_attention_compute(job, plan, 0, n_threads, work);
    for (auto & thread : threads) {
        thread.join();
    }
}

std::vector<float> computed(const scene & all, const way & how) {
    const auto &        s = all.s;
    const cells         laid(all, how);
    lminf_attention_job job = {};
    job.n_embd_k            = s.n_embd_k;
    job.n_embd_v            = s.n_embd_v;
    job.n_head              = s.n_head;
    job.n_head_kv           = s.n_head_kv;
    job.scale               = all.scale();
    job.softcap             = s.softcap;
    job.slopes              = s.slopes ? all.slopes.data() : nullptr;
    job.n_clamp             = all.alibi_clamp();
    job.sink_logits         = s.logits ? all.logits.data() : nullptr;
    job.streams             = laid.streams.data();
    job.parts               = s.parts;

    const int64_t      n = all.queries.size();
    std::vector<float> res(n * all.n_row(), NAN);
    const size_t       n_bytes =
        lminf_attention_work_size(job, std::min(n, how.n_tile), s.n_sink + s.n_window, how.n_threads);
    std::vector<char> memory(n_bytes + 64, (char)0xff);
    void *            work = (void *)(((uintptr_t)memory.data() + 63) / 64 * 64);
    lminf_attention_work_init(work);
    for (int64_t i = 0; i < n; i += how.n_tile) {
        job.n_tokens = std::min(how.n_tile, n - i);
        const auto vectors = [&](const std::vector<float> & x) {
            const size_t head_stride = s.n_embd_k * sizeof(float);
            return lminf_attention_vectors{x.data() + i * s.n_head * s.n_embd_k, head_stride, s.n_head * head_stride};
        };
        job.q        = vectors(all.q);
        job.q_far    = vectors(all.q_far);
        job.queries  = all.queries.data() + i;
        job.dst      = res.data() + i * all.n_row();
        compute(job, how.n_threads, work, n_bytes);
    }
    return res;
}

struct error {
    double largest = 0.0;
    double squares = 0.0;
    double norm    = 0.0;

    void add(double x, double expected) {
        const double difference = x == expected ? 0.0 : std::fabs(x - expected); // -infinity where nothing is seen
        largest                 = std::isnan(difference) ? INFINITY : std::max(largest, difference);
        squares += difference * difference;
        norm += std::isinf(expected) ? 0.0 : expected * expected;
    }

    double relative() const { return std::sqrt(squares / std::max(norm, 1e-300)); }
};

error error_of(const scene & all, const std::vector<float> & results) {
    error res;
    for (size_t i = 0; i < all.queries.size(); ++i) {
        const auto expected = all.expected(i);
        for (size_t j = 0; j < expected.size(); ++j) {
            res.add(results[i * expected.size() + j], expected[j]);
        }
    }
    return res;
}

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

const ggml_type TYPES[] = {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0};


// ggml's flash attention on the same; one stream, no far sink tokens, no ALiBi
std::vector<float> computed_by_ggml(const scene & all) {
    const auto &   s   = all.s;
    ggml_context * ctx = ggml_init({(size_t)256 << 20, nullptr, false});
    const int64_t  n   = s.n_tokens;
    ggml_tensor *  q   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n_embd_k, s.n_head, n);
    memcpy(q->data, all.q.data(), ggml_nbytes(q));
    const auto rows = [&](const std::vector<char> & data, ggml_type type, int64_t n_embd) {
        ggml_tensor * res = ggml_new_tensor_3d(ctx, type, n_embd, s.n_head_kv, all.n_keys);
        memcpy(res->data, data.data(), ggml_nbytes(res));
        return ggml_permute(ctx, res, 0, 2, 1, 3);
    };
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, all.n_keys, n);
    for (int64_t i = 0; i < n; ++i) {
        const auto & query = all.queries[i];
        for (int64_t j = 0; j < all.n_keys; ++j) {
            const int64_t pos     = j < s.n_sink ? j : all.first_key + j - s.n_sink;
            const bool    visible = pos < query.sinks || (pos >= query.begin && pos < query.end && all.there(pos));
            ((uint16_t *)mask->data)[i * all.n_keys + j] = visible ? 0 : 0xfc00;
        }
    }
    ggml_tensor * res = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), rows(all.k[0], s.type_k, s.n_embd_k),
        rows(all.v[0], s.type_v, s.n_embd_v), mask, all.scale(), 0.0f, s.softcap);
    if (s.logits) {
        ggml_tensor * sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, s.n_head);
        memcpy(sinks->data, all.logits.data(), ggml_nbytes(sinks));
        ggml_flash_attn_ext_add_sinks(res, sinks);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, res);
    ggml_graph_compute_with_ctx(ctx, graph, 1);
    std::vector<float> out((float *)res->data, (float *)res->data + ggml_nelements(res));
    ggml_free(ctx);
    return out;
}

bool print_errors = false;
bool quick        = false; // fewer types and sizes: for sanitizers, and where there is little time

void check_no_worse_than_ggml(const shape & s) {
    const scene all(s);
    const error ours  = error_of(all, computed(all, {}));
    const error stock = error_of(all, computed_by_ggml(all));
    if (print_errors || ours.relative() > stock.relative() || ours.largest > 1.5 * stock.largest) {
        printf("%5s %5s heads of %3d/%3d, %3d queries: ours %.1e (largest %.1e), ggml %.1e (%.1e)\n",
            ggml_type_name(s.type_k), ggml_type_name(s.type_v), (int)s.n_embd_k, (int)s.n_embd_v, (int)s.n_tokens,
            ours.relative(), ours.largest, stock.relative(), stock.largest);
    }
    CHECK(ours.relative() <= stock.relative());
    CHECK(ours.largest <= 1.5 * stock.largest); // one number of thousands
}

void test_no_worse_than_ggml() {
    for (const ggml_type type_k : TYPES) {
        for (const ggml_type type_v : TYPES) {
            shape s;
            s.type_k = type_k;
            s.type_v = type_v;
            for (const int64_t n_embd : {64, 128}) {
                s.n_embd_k = s.n_embd_v = n_embd;
                s.first                 = 2047;
                s.n_window              = 2048;
                s.n_tokens              = 3;
                check_no_worse_than_ggml(s);
                s.n_window = 500;
                s.n_tokens = 70;
                check_no_worse_than_ggml(s);
            }
        }
    }
    shape s;
    s.type_k = s.type_v = GGML_TYPE_F16;
    for (const int64_t n_embd : {80, 96, 112, 192, 256}) {
        s.n_embd_k = s.n_embd_v = n_embd;
        s.first                 = 700;
        check_no_worse_than_ggml(s);
    }
    s.type_k   = GGML_TYPE_F32;
    s.type_v   = GGML_TYPE_F32;
    s.n_embd_k = 192;
    s.n_embd_v = 128;
    s.softcap  = 20.0f;
    s.n_tokens = 40;
    check_no_worse_than_ggml(s);
    s.softcap = 0.0f;
    s.logits  = true;
    check_no_worse_than_ggml(s);
}


// ---- statements ----

void check_exact(const shape & s) {
    const scene all(s);
    const error found = error_of(all, computed(all, {1, 1 << 20, 29, 3}));
    const bool  whole = s.type_k == GGML_TYPE_Q8_0 || s.type_k == GGML_TYPE_Q4_0; // queries in sixteen bits
    const double most = whole ? 1e-4 : 1e-6;
    if (found.relative() > most) {
        printf("%d %d heads of %d/%d: %.1e\n", s.type_k, s.type_v, (int)s.n_embd_k, (int)s.n_embd_v, found.relative());
    }
    CHECK(found.relative() <= most);
}

void test_all_types_and_sizes() {
    for (const ggml_type type_k : TYPES) {
        for (const ggml_type type_v : TYPES) {
            for (const int64_t n_embd : {8, 16, 32, 64, 80, 96, 112, 128, 192, 256}) {
                if (quick && (type_k != type_v || (n_embd != 64 && n_embd != 80))) {
                    continue;
                }
                shape s;
                s.type_k   = type_k;
                s.type_v   = type_v;
                s.n_embd_k = s.n_embd_v = n_embd;
                s.n_tokens              = 3;
                s.first                 = 777;
                const bool serves       = n_embd % 32 == 0 ||
                    (type_k != GGML_TYPE_Q8_0 && type_k != GGML_TYPE_Q4_0 && type_v != GGML_TYPE_Q8_0 &&
                        type_v != GGML_TYPE_Q4_0);
                CHECK(lminf_attention_serves(type_k, type_v, n_embd, n_embd) == serves);
                if (serves) {
                    check_exact(s);
                }
            }
        }
    }
    CHECK(!lminf_attention_serves(GGML_TYPE_Q4_1, GGML_TYPE_F16, 48, 64));
    CHECK(!lminf_attention_serves(GGML_TYPE_F16, GGML_TYPE_F16, 60, 64));
}

// Types that ggml unpacks give the bits of the floats that it unpacks them into.
void check_converted(ggml_type type) {
    const int64_t n_embd = 64, n_keys = 100;

    std::vector<float> keys(n_keys * n_embd), q(n_embd);
    srand(1);
    for (auto * x : {&keys, &q}) {
        std::generate(x->begin(), x->end(), [] { return (float)rand() / (float)RAND_MAX - 0.5f; });
    }
    std::vector<char> packed(n_keys * ggml_row_size(type, n_embd));
    ggml_quantize_chunk(type, keys.data(), packed.data(), 0, n_keys, n_embd, nullptr);
    ggml_get_type_traits(type)->to_float(packed.data(), keys.data(), n_keys * n_embd);

    const auto attend = [&](ggml_type as, const void * data) {
        const lminf_run             run    = {0, 0, n_keys};
        const lminf_rows            rows   = {as, (const char *)data, ggml_row_size(as, n_embd), 0};
        const lminf_attention_stream stream = {rows, rows, rows, &run, 1};
        const lminf_attention_query query  = {0, n_keys - 1, 0, 0, 3, n_keys};
        std::vector<float>          res(n_embd);
        lminf_attention_job         job = {};
        job.n_embd_k = job.n_embd_v = n_embd;
        job.n_head = job.n_head_kv = job.n_tokens = 1;
        job.q       = {q.data(), n_embd * sizeof(float), n_embd * sizeof(float)};
        job.scale   = 1.0f;
        job.queries = &query;
        job.streams = &stream;
        job.dst     = res.data();
        lminf_attention_plan plan;
        plan.make(job, 1);
        std::vector<char> memory(plan.work_size(job) + 64);
        void *            work = (void *)(((uintptr_t)memory.data() + 63) / 64 * 64);
        lminf_attention_work_init(work);
        lminf_attention_compute(job, plan, 0, 1, work);
        return res;
    };
    CHECK(lminf_attention_serves(type, type, n_embd, n_embd));
    CHECK(attend(type, packed.data()) == attend(GGML_TYPE_F32, keys.data()));
}

std::vector<shape> scenes() {
    std::vector<shape> res;
    shape              s;
    s.n_tokens = 150;
    s.type_k   = GGML_TYPE_F16;
    s.type_v   = GGML_TYPE_Q8_0;
    res.push_back(s); // from the first token on, nothing leaves the window

    s.first   = 250; // the window begins to move, sink tokens become far ones
    s.n_clamp = 272;
    s.n_sink  = 40;
    s.type_k  = GGML_TYPE_Q8_0;
    s.type_v  = GGML_TYPE_Q4_0;
    res.push_back(s);

    s.first     = (1ll << 40) + 77; // far away
    s.n_clamp   = 300;
    s.n_sink    = 5;
    s.n_head    = 9;
    s.n_head_kv = 3;
    s.gaps      = true;
    s.type_k    = GGML_TYPE_Q4_0;
    res.push_back(s);

    s.first     = 5000;
    s.n_streams = 3;
    s.n_tokens  = 20;
    s.softcap   = 5.0f;
    s.logits    = true;
    s.type_k    = GGML_TYPE_F32;
    s.type_v    = GGML_TYPE_F16;
    res.push_back(s);

    s.softcap   = 0.0f;
    s.slopes    = true;
    s.n_embd_k  = 80;
    s.n_embd_v  = 24;
    s.type_k    = GGML_TYPE_BF16;
    s.parts     = true;
    s.n_sink    = 300; // a pinned prompt
    s.n_clamp   = 4850;
    s.n_head    = 7;
    s.n_head_kv = 1;
    res.push_back(s);

    s.n_sink    = 0;
    s.n_window  = 1;
    s.n_head_kv = 7;
    s.logits    = false;
    s.gaps      = true; // some queries see nothing at all
    res.push_back(s);
    return res;
}

void test_features() {
    for (const auto & s : scenes()) {
        check_exact(s);
    }
}

void test_same_bits() {
    size_t n_scenes = 0;
    for (auto s : scenes()) {
        if (quick && ++n_scenes > 2) {
            break;
        }
        const scene all(s);
        const auto  reference = computed(all, {});
        for (const int n_threads : {1, 2, 3, 5}) {
            for (const int64_t n_tile : {1, 7, 64, 256}) {
                CHECK(same_bits(reference, computed(all, {n_threads, n_tile, 1 << 20, 0})));
                CHECK(same_bits(reference, computed(all, {n_threads, n_tile, 1 + n_tile % 11, (int)n_tile})));
            }
        }
        CHECK(same_bits(reference, computed(all, {1, 1 << 20, 1, 9})));
        CHECK(same_bits(reference, computed(all, {2, 13, 3, 11})));
    }
}

void test_same_bits_beside_others() {
    // the same queries and keys, alone and as the first of three streams
    shape s          = scenes()[1];
    s.n_streams      = 1;
    s.first          = 300;
    s.n_tokens       = 33;
    const auto alone = computed(scene(s), {});
    shape      more  = s;
    more.n_streams   = 3;
    scene       both(more);
    const scene one(s);
    both.k[0]     = one.k[0];
    both.v[0]     = one.v[0];
    both.far_k[0] = one.far_k[0];
    std::copy(one.q.begin(), one.q.end(), both.q.begin());
    std::copy(one.q_far.begin(), one.q_far.end(), both.q_far.begin());
    for (const int n_threads : {1, 2, 5}) {
        auto beside = computed(both, {n_threads, 1 << 20, 17, 2});
        beside.resize(alone.size());
        CHECK(same_bits(alone, beside));
    }
}

} // namespace

int main(int argc, char ** argv) {
    quick        = argc > 1 && std::string(argv[1]) == "--quick";
    print_errors = argc > 1 && std::string(argv[1]) == "--errors";
    printf("%s\n", lminf_attention_simd());
    test_all_types_and_sizes();
    test_features();
    test_same_bits();
    test_same_bits_beside_others();
    ggml_cpu_init();
    for (const ggml_type type : {GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1}) {
        check_converted(type);
    }
    if (!quick) {
        test_no_worse_than_ggml();
    }
    return n_failed != 0;
}
