// Writes the logits of every position of a token stream, computed on the CPU.
//
// Uses llama.h only, so that the stock library and ours run the very same program. Called by tests/python/stock.py.

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<llama_token> read_tokens(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw std::runtime_error("cannot read " + path);
    }
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::vector<llama_token> tokens(bytes.size() / sizeof(llama_token));
    std::copy_n(bytes.data(), tokens.size() * sizeof(llama_token), reinterpret_cast<char *>(tokens.data()));
    return tokens;
}

ggml_type parse_type(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * type_name = ggml_type_name(ggml_type(i));
        if (type_name != nullptr && name == type_name) {
            return ggml_type(i);
        }
    }
    throw std::runtime_error("unknown cache type " + name);
}

void run(const std::vector<std::string> & args) {
    std::vector<llama_token> tokens = read_tokens(args[1]);

    std::ofstream out(args[2], std::ios::binary);
    if (!out) {
        throw std::runtime_error("cannot write " + args[2]);
    }

    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(args[0].c_str(), mparams), llama_model_free);
    if (!model) {
        throw std::runtime_error("cannot load " + args[0]);
    }

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = uint32_t(std::stoul(args[3]));
    cparams.n_batch         = uint32_t(std::stoul(args[4]));
    cparams.n_ubatch        = uint32_t(std::stoul(args[5]));
    cparams.n_threads       = std::stoi(args[6]);
    cparams.n_threads_batch = cparams.n_threads;
    cparams.type_k          = parse_type(args[7]);
    cparams.type_v          = parse_type(args[8]);
    cparams.flash_attn_type = args[9] == "1" ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cparams.offload_kqv     = false;
    cparams.op_offload      = false;
    const std::unique_ptr<llama_context, decltype(&llama_free)> ctx(
        llama_init_from_model(model.get(), cparams), llama_free);
    if (!ctx) {
        throw std::runtime_error("cannot make a context");
    }

    const size_t n_vocab = size_t(llama_vocab_n_tokens(llama_model_get_vocab(model.get())));
    const size_t n_batch = llama_n_batch(ctx.get());

    for (size_t start = 0; start < tokens.size(); start += n_batch) {
        const size_t n_tokens = std::min(n_batch, tokens.size() - start);
        std::vector<int8_t> output(n_tokens, 1);

        llama_batch batch = llama_batch_get_one(tokens.data() + start, int32_t(n_tokens));
        batch.logits = output.data();

        const int32_t status = llama_decode(ctx.get(), batch);
        if (status != 0) {
            throw std::runtime_error("llama_decode() returned " + std::to_string(status) + " at token " + std::to_string(start));
        }
        out.write(reinterpret_cast<const char *>(llama_get_logits(ctx.get())),
                  std::streamsize(n_tokens * n_vocab * sizeof(float)));
    }
    if (!out.flush()) {
        throw std::runtime_error("cannot write " + args[2]);
    }
}

} // namespace

int main(int argc, char ** argv) {
    if (argc != 11) {
        fprintf(stderr, "usage: lminf-logits model.gguf tokens.bin(int32) logits.bin(f32) n_ctx n_batch n_ubatch n_threads type_k"
                        " type_v flash_attn(0|1)\n");
        return 2;
    }
    try {
        run({argv + 1, argv + argc});
    } catch (const std::exception & error) {
        fprintf(stderr, "lminf-logits: %s\n", error.what());
        return 1;
    }
    return 0;
}
