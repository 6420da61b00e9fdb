// Saved states of sequences (llama_state_*): what one cache adds to them. lminf_memory writes the header.

#include "lminf-kv-cache.h"

#include "lminf-middle.h"
#include "lminf-sinks.h"

#include "llama-io.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

std::vector<std::pair<std::string, int64_t>> lminf_kv_cache::state_parameters() const {
    std::vector<std::pair<std::string, int64_t>> res = {
        { "n_sink",           policy.n_sink             },
        { "n_window",         policy.n_window           },
        { "n_clamp",          policy.n_clamp            },
        { "n_block",          policy.n_block            },
        { "n_rollback",       policy.n_rollback         },
        { "n_rebase",         policy.rebase_limit()     },
        { "n_ubatch",         policy.n_ubatch           },
        { "sink_order",       policy.kept_order         },
        { "flash attention",  !v_trans                  },
        { "own attention",    group->has_own_attention() },
        { "number of layers", (int64_t) layers.size()   },
        { "max_tokens",       policy.n_middle           },
        { "the cache type of middle tokens", middle ? middle->get_store().type : GGML_TYPE_COUNT },
        { "bytes of a middle token",         middle ? (int64_t) middle->get_store().token_size() : 0 },
    };
    // a row too: a cache of other heads is another cache
    for (const auto & layer : layers) {
        const std::string name = " of layer " + std::to_string(layer.il);
        res.emplace_back("cache type of K" + name, layer.k->type);
        res.emplace_back("components of K" + name, layer.k->ne[0]);
        if (layer.v) {
            res.emplace_back("cache type of V" + name, layer.v->type);
            res.emplace_back("components of V" + name, layer.v->ne[0]);
        }
    }
    return res;
}

template <typename F>
void lminf_kv_cache::for_each_slice(llama_seq_id seq_id, int64_t n_used, F && f) const {
    for (size_t i = 0; i < kv.all.size(); ++i) {
        const auto & layer = kv.all[i];

        ggml_tensor * k = layer.k_stream[seq_id];
        f(k, 0, n_used*k->nb[1]);

        if (ggml_tensor * v = layer.v_stream[seq_id]) {
            if (!v_trans) {
                f(v, 0, n_used*v->nb[1]);
            } else {
                for (int64_t j = 0; j < v->ne[0]; ++j) {
                    f(v, ggml_row_size(v->type, j*v->ne[1]), ggml_row_size(v->type, n_used));
                }
            }
        }
        if (ggml_tensor * originals = sinks->originals()[i]) {
            const auto [offset, size] = sinks->slice(originals, seq_id);
            f(originals, offset, size);
        }
    }
}

void lminf_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    const llama_seq_id s0 = seq_id < 0 ? 0                     : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        const auto books = seqs.at(s).save();

        const auto n_books = (uint64_t) books.size();
        io.write(&n_books, sizeof(n_books));
        io.write(books.data(), books.size()*sizeof(books[0]));

        for_each_slice(s, seqs[s].n_used(), [&](ggml_tensor * t, size_t offset, size_t size) {
            io.write_tensor(t, offset, size);
        });
        if (middle) {
            middle->write(io, s, seqs[s]);
        }
    }
}

void lminf_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(flags);

    const llama_seq_id s0 = seq_id < 0 ? 0                     : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    for (llama_seq_id s = s0; s <= s1; ++s) {
        const std::runtime_error damaged("the state of sequence " + std::to_string(s) + " is damaged");

        lminf_sequence seq(policy);

        uint64_t n_books = 0;
        io.read(&n_books, sizeof(n_books));
        const uint64_t n_most = seq.save().size() + 3*(uint64_t) policy.n_ring();
        if (n_books > n_most) {
            throw damaged;
        }
        std::vector<int64_t> books(n_books);
        io.read(books.data(), books.size()*sizeof(books[0]));
        if (!seq.load(books)) {
            throw damaged;
        }

        seqs[s] = lminf_sequence(policy); // empty until all is there
        for_each_slice(s, seq.n_used(), [&](ggml_tensor * t, size_t offset, size_t size) {
            io.read_tensor(t, offset, size);
        });
        if (middle) {
            middle->read(io, s, seq);
        }
        seqs[s] = std::move(seq);
        group->damaged[s] = false;
    }
}
