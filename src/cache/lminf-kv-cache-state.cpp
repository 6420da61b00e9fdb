// Saved states of sequences (llama_state_*).

#include "lminf-kv-cache.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

static constexpr uint32_t STATE_MAGIC   = 0x464e494c; // "LINF"
static constexpr uint32_t STATE_VERSION = 2;

// what has to be the same when a state is read
std::vector<std::pair<const char *, int64_t>> lminf_kv_cache::state_parameters() const {
    const auto type = [&](ggml_tensor * kv_layer::* t) {
        return layers.empty() || !(layers[0].*t) ? GGML_TYPE_COUNT : (layers[0].*t)->type;
    };
    return {
        { "n_sink",           policy.n_sink            },
        { "n_window",         policy.n_window          },
        { "n_clamp",          policy.n_clamp           },
        { "n_block",          policy.n_block           },
        { "n_rollback",       policy.n_rollback        },
        { "n_rebase",         policy.rebase_limit()    },
        { "n_ubatch",         policy.n_ubatch          },
        { "sink_order",       policy.kept_order        },
        { "cache type of K",  type(&kv_layer::k)       },
        { "cache type of V",  type(&kv_layer::v)       },
        { "flash attention",  !v_trans                 },
        { "number of layers", (int64_t) layers.size()  },
        { "max_tokens",       policy.n_middle          },
        { "the cache type of middle tokens", middle ? middle->store.type : GGML_TYPE_COUNT },
        { "bytes of a middle token",         middle ? (int64_t) middle->store.token_size() : 0 },
    };
}

template <typename T>
static void write_value(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T>
static T read_value(llama_io_read_i & io) {
    T res;
    io.read(&res, sizeof(res));
    return res;
}

template <typename F>
void lminf_kv_cache::for_each_slice(llama_seq_id seq_id, int64_t n_used, F && f) const {
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & layer = layers[i];

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
        if (sink_k[i]) {
            const size_t n = policy.n_sink*sink_k[i]->nb[1];
            f(sink_k[i], seq_id*n, n);
        }
    }
}

void lminf_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        throw std::runtime_error("LM-Infinite saves sequences as a whole");
    }

    write_value(io, STATE_MAGIC);
    write_value(io, STATE_VERSION);
    for (const auto & [_, value] : state_parameters()) {
        write_value(io, value);
    }

    const llama_seq_id s0 = seq_id < 0 ? 0                     : seq_id;
    const llama_seq_id s1 = seq_id < 0 ? (int) seqs.size() - 1 : seq_id;

    write_value(io, (uint32_t) (s1 - s0 + 1));
    for (llama_seq_id s = s0; s <= s1; ++s) {
        const auto data = seqs.at(s).save();

        write_value(io, (uint64_t) data.size());
        io.write(data.data(), data.size()*sizeof(data[0]));

        for_each_slice(s, seqs[s].n_used(), [&](ggml_tensor * t, size_t offset, size_t size) {
            io.write_tensor(t, offset, size);
        });
        if (middle) {
            write_middle(io, s);
        }
    }
}

void lminf_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) {
        throw std::runtime_error("LM-Infinite restores sequences as a whole");
    }
    if (seq_id >= 0 && !has_seq(seq_id)) {
        throw std::runtime_error("there is no such sequence");
    }
    if (read_value<uint32_t>(io) != STATE_MAGIC || read_value<uint32_t>(io) != STATE_VERSION) {
        throw std::runtime_error("this is not the state of an LM-Infinite cache, or that of another version");
    }
    for (const auto & [name, value] : state_parameters()) {
        const auto saved = read_value<int64_t>(io);
        if (saved != value) {
            throw std::runtime_error(std::string("the state was saved with ") + name + " = " + std::to_string(saved) + ", this context has " +
                    std::to_string(value));
        }
    }
    const auto n_seqs = read_value<uint32_t>(io);
    if (n_seqs != (seq_id < 0 ? seqs.size() : 1)) {
        throw std::runtime_error("the state holds " + std::to_string(n_seqs) + " sequences");
    }

    for (uint32_t i = 0; i < n_seqs; ++i) {
        const llama_seq_id s = seq_id < 0 ? (llama_seq_id) i : seq_id;

        lminf_sequence seq(policy);

        auto data = seq.save(); // as long as what was written
        if (read_value<uint64_t>(io) != data.size()) {
            throw std::runtime_error("the state of sequence " + std::to_string(s) + " is damaged");
        }
        io.read(data.data(), data.size()*sizeof(data[0]));
        if (!seq.load(data)) {
            throw std::runtime_error("the state of sequence " + std::to_string(s) + " is damaged");
        }

        // empty until all is there
        seqs[s] = lminf_sequence(policy);
        for_each_slice(s, seq.n_used(), [&](ggml_tensor * t, size_t offset, size_t size) {
            io.read_tensor(t, offset, size);
        });
        if (middle) {
            read_middle(io, s, seq);
        }
        seqs[s] = seq;
    }
}
