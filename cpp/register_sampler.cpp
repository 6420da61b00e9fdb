#include "context.h"
#include "errors.h"
#include "logprob.h"
#include "module.h"

#include <cmath>

namespace py = pybind11;

namespace lminf_python {

struct sampler_deleter {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

// llama.cpp's samplers in llama.cpp's order: penalties, top-k, top-p, min-p, temperature, draw.
class Sampler {
public:
    Sampler(std::shared_ptr<Model> model, uint32_t seed, float temperature, int32_t top_k, float top_p, float min_p,
        float repeat_penalty, float frequency_penalty, float presence_penalty, int32_t penalty_last_n) :
        model(std::move(model)),
        chain(llama_sampler_chain_init(llama_sampler_chain_default_params())) {
        add(llama_sampler_init_penalties(
            this->model->n_vocab(), penalty_last_n, repeat_penalty, frequency_penalty, presence_penalty));
        if (temperature <= 0.0f) {
            add(llama_sampler_init_greedy());
            return;
        }
        add(llama_sampler_init_top_k(top_k));
        add(llama_sampler_init_top_p(top_p, 1));
        add(llama_sampler_init_min_p(min_p, 1));
        add(llama_sampler_init_temp(temperature));
        add(llama_sampler_init_dist(seed));
    }

    // Tokens that the penalties count although they were not drawn: the prompt's.
    void accept(const token_array & tokens) {
        model->check_tokens(tokens.data(), tokens.size());
        for (py::ssize_t i = 0; i < tokens.size(); i++) {
            llama_sampler_accept(chain.get(), tokens.data()[i]);
        }
    }

    // Draws the token after the last one of a sequence. Returns it and its natural-log probability before any sampler.
    std::pair<llama_token, float> sample(Context & context, llama_seq_id seq_id) {
        if (context.model != model) {
            throw error(error_type::config, "the sampler was made for another model");
        }
        const Context::use held(context, seq_id);
        const float *      logits  = held.last_logits();
        const int32_t      n_vocab = model->n_vocab();
        // llama.cpp aborts the process when no token can be drawn
        for (int32_t i = 0; i < n_vocab; i++) {
            if (std::isnan(logits[i])) {
                throw error(error_type::context, "the model computed logits that are not numbers");
            }
        }
        const llama_token token = llama_sampler_sample(chain.get(), held.ctx(), -1);
        return {token, logprob(logits, n_vocab, token)};
    }

private:
    void add(llama_sampler * sampler) {
        if (!sampler) {
            throw error(error_type::config, "llama.cpp refused the sampling options");
        }
        llama_sampler_chain_add(chain.get(), sampler);
    }

    const std::shared_ptr<Model>                    model;
    std::unique_ptr<llama_sampler, sampler_deleter> chain;
};

void register_sampler(py::module_ & m) {
    py::class_<Sampler>(m, "Sampler")
        .def(py::init<std::shared_ptr<Model>, uint32_t, float, int32_t, float, float, float, float, float, int32_t>(),
            py::arg("model"), py::kw_only(), py::arg("seed"), py::arg("temperature"), py::arg("top_k"),
            py::arg("top_p"), py::arg("min_p"), py::arg("repeat_penalty"), py::arg("frequency_penalty"),
            py::arg("presence_penalty"), py::arg("penalty_last_n"))
        .def("accept", &Sampler::accept, py::arg("tokens").noconvert())
        .def("sample", &Sampler::sample, py::arg("context"), py::arg("seq_id") = 0);
}

} // namespace lminf_python
