// How long attention takes, ours against ggml's GGML_OP_FLASH_ATTN_EXT: both as nodes of a graph with a cache for each
// layer, so that keys come from memory as they do in a decode step. Interleaved; the fastest of the rounds. One
// thread's time is processor time, so that other processes count little; two threads' is by the clock, on an idle
// machine only.

#include "lminf-attention.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <string>
#include <vector>

namespace {

struct shape {
    const char * name;
    int64_t      n_embd_head;
    int64_t      n_head;
    int64_t      n_head_kv;
    int64_t      n_layer;
    int64_t      n_tokens;
    int64_t      n_window;
};

struct layer {
    ggml_tensor *          q;
    ggml_tensor *          k;
    ggml_tensor *          v;
    lminf_attention_stream stream;
    lminf_attention_job    job;
};

double seconds(bool processor) {
    if (processor) {
        return (double)clock() / CLOCKS_PER_SEC;
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double least(const std::vector<double> & x) {
    return *std::min_element(x.begin(), x.end());
}

class bench {
public:
    bench(const shape & shape_, ggml_type type_k, ggml_type type_v, int n_threads_) :
        s(shape_),
        n_threads(n_threads_),
        n_cells(s.n_window + s.n_tokens - 1),
        layers(s.n_layer) {
        n_cells                 = (n_cells + 255) / 256 * 256;
        ggml_init_params params = {(size_t)2 << 30, nullptr, false};
        ctx                     = ggml_init(params);
        stock                   = ggml_new_graph(ctx);
        ours                    = ggml_new_graph(ctx);
        make_queries();
        for (auto & l : layers) {
            make_layer(l, type_k, type_v);
        }
        plan.make(layers[0].job, n_threads);
        work.resize(plan.work_size(layers[0].job) + 64);
        lminf_attention_work_init(aligned_work());
    }

    ~bench() { ggml_free(ctx); }

    // seconds of stock and ours
    void run(int n_rounds, double * t_stock, double * t_ours) {
        std::vector<double> times[2];
        for (int i = 0; i < n_rounds; ++i) {
            times[0].push_back(compute(stock));
            times[1].push_back(compute(ours));
        }
        *t_stock = least(times[0]);
        *t_ours  = least(times[1]);
    }

private:
    const shape                        s;
    const int                          n_threads;
    int64_t                            n_cells;
    ggml_context *                     ctx;
    ggml_cgraph *                      stock;
    ggml_cgraph *                      ours;
    ggml_tensor *                      mask;
    std::vector<layer>                 layers;
    std::vector<lminf_run>             runs;
    std::vector<lminf_attention_query> queries;
    lminf_attention_plan               plan;
    std::vector<char>                  work;
    std::mt19937                       random{7};
    std::vector<uint8_t>               buffer;

    void * aligned_work() { return (void *)(((uintptr_t)work.data() + 63) / 64 * 64); }

    // a ring that is full, with its oldest key somewhere in the middle
    void make_queries() {
        const int64_t pos   = 1000003;
        const int64_t first = pos - s.n_window + 1;
        const int64_t n     = s.n_window + s.n_tokens - 1;
        const int64_t start = n / 3;
        runs                = {{first, start, n - start}, {first + n - start, 0, start}};
        mask                = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_cells, s.n_tokens);
        for (int64_t t = 0; t < s.n_tokens; ++t) {
            queries.push_back({0, pos + t, 0, 0, first + t, pos + t + 1});
            for (int64_t i = 0; i < n_cells; ++i) {
                const int64_t j                              = first + (i - start + n) % n;
                const bool    visible                        = i < n && j >= first + t && j <= pos + t;
                ((ggml_fp16_t *)mask->data)[t * n_cells + i] = ggml_fp32_to_fp16(visible ? 0.0f : -INFINITY);
            }
        }
    }

    ggml_tensor * random_rows(ggml_type type, int64_t n, int64_t n_rows) {
        ggml_tensor *                   res = ggml_new_tensor_2d(ctx, type, n, n_rows);
        std::normal_distribution<float> normal;
        std::vector<float>              some(n * std::min<int64_t>(n_rows, 64));
        for (auto & x : some) {
            x = normal(random);
        }
        for (int64_t i = 0; i < n_rows; ++i) {
            const float * x = some.data() + (i * 7 % std::min<int64_t>(n_rows, 64)) * n;
            ggml_quantize_chunk(type, x, (char *)res->data + i * res->nb[1], 0, 1, n, nullptr);
        }
        return res;
    }

    lminf_rows rows(const ggml_tensor * t) const {
        return {t->type, (const char *)t->data, t->nb[1], ggml_row_size(t->type, s.n_embd_head)};
    }

    ggml_tensor * heads(ggml_tensor * t, int64_t n_head, int64_t n) const {
        return ggml_view_3d(ctx, t, s.n_embd_head, n, n_head, t->nb[1], ggml_row_size(t->type, s.n_embd_head), 0);
    }

    void make_layer(layer & l, ggml_type type_k, ggml_type type_v) {
        l.q      = random_rows(GGML_TYPE_F32, s.n_embd_head * s.n_head, s.n_tokens);
        l.k      = random_rows(type_k, s.n_embd_head * s.n_head_kv, n_cells);
        l.v      = random_rows(type_v, s.n_embd_head * s.n_head_kv, n_cells);
        l.stream = {rows(l.k), rows(l.v), rows(l.k), runs.data(), (int64_t)runs.size()};

        const float scale = 1.0f / std::sqrt((float)s.n_embd_head);
        ggml_build_forward_expand(stock,
            ggml_flash_attn_ext(ctx, heads(l.q, s.n_head, s.n_tokens), heads(l.k, s.n_head_kv, n_cells),
                heads(l.v, s.n_head_kv, n_cells), mask, scale, 0.0f, 0.0f));

        ggml_tensor * args[] = {l.q};
        ggml_tensor * dst    = ggml_custom_4d(
            ctx, GGML_TYPE_F32, s.n_embd_head, s.n_head, s.n_tokens, 1, args, 1,
            [](ggml_tensor *, int ith, int nth, void * data) {
                auto & self = *((std::pair<bench *, layer *> *)data)->first;
                lminf_attention_compute(
                    ((std::pair<bench *, layer *> *)data)->second->job, self.plan, ith, nth, self.aligned_work());
            },
            GGML_N_TASKS_MAX, new std::pair<bench *, layer *>(this, &l));
        ggml_build_forward_expand(ours, dst);

        l.job          = {};
        l.job.n_embd_k = l.job.n_embd_v = s.n_embd_head;
        l.job.n_head                    = s.n_head;
        l.job.n_head_kv                 = s.n_head_kv;
        l.job.n_tokens                  = s.n_tokens;
        l.job.q                         = {(const float *)l.q->data, s.n_embd_head * sizeof(float), l.q->nb[1]};
        l.job.scale                     = scale;
        l.job.queries                   = queries.data();
        l.job.streams                   = &l.stream;
        l.job.dst                       = (float *)dst->data;
    }

    double compute(ggml_cgraph * graph) {
        ggml_cplan cplan = ggml_graph_plan(graph, n_threads, nullptr);
        buffer.resize(std::max(buffer.size(), cplan.work_size));
        cplan.work_data   = buffer.data();
        const double from = seconds(n_threads == 1);
        ggml_graph_compute(graph, &cplan);
        return seconds(n_threads == 1) - from;
    }
};

} // namespace

int main(int argc, char ** argv) {
    const int    n_rounds = argc > 1 ? atoi(argv[1]) : 15;
    const char * only     = argc > 2 ? argv[2] : "";
    const shape  shapes[] = {
        {"decode 9/3 heads of 64", 64, 9, 3, 30, 1, 2048},
        {"decode 32/8 heads of 128", 128, 32, 8, 8, 1, 2048},
        {"prompt 256 9/3 heads of 64", 64, 9, 3, 2, 256, 2048},
        {"prompt 256 32/8 heads of 128", 128, 32, 8, 1, 256, 2048},
    };
    const ggml_type types[][2] = {
        {GGML_TYPE_F16, GGML_TYPE_F16},
        {GGML_TYPE_Q8_0, GGML_TYPE_Q8_0},
        {GGML_TYPE_Q4_0, GGML_TYPE_Q4_0},
        {GGML_TYPE_Q8_0, GGML_TYPE_Q4_0},
    };
    ggml_cpu_init();
    printf("%s, ms of all layers: stock, ours, ratio; 1 thread, then 2 and ours against 1 thread\n",
        lminf_attention_simd());
    for (const auto & s : shapes) {
        if (std::string(s.name).rfind(only, 0) != 0) {
            continue;
        }
        for (const auto & type : types) {
            printf("%-30s %5s %5s", s.name, ggml_type_name(type[0]), ggml_type_name(type[1]));
            double one = 0.0;
            for (int n_threads = 1; n_threads <= 2; ++n_threads) {
                double stock;
                double ours;
                bench(s, type[0], type[1], n_threads)
                    .run(s.n_tokens > 1 ? (n_rounds + 2) / 3 : n_rounds, &stock, &ours);
                printf("  %8.2f %7.2f %6.2f", stock * 1e3, ours * 1e3, stock / ours);
                if (n_threads == 1) {
                    one = ours;
                } else {
                    printf("  x%.2f", one / ours);
                }
                fflush(stdout);
            }
            printf("\n");
        }
    }
}
