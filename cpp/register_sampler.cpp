#include "module.h"
#include "sampler.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace lminf_python {

static std::unique_ptr<Sampler> make_sampler(std::shared_ptr<Model> model, uint32_t seed, float temperature,
    int32_t top_k, float top_p, float min_p, float repeat_penalty, float frequency_penalty, float presence_penalty,
    int32_t penalty_last_n, std::map<llama_token, float> logit_bias, std::string grammar) {
    sampler_options options;
    options.seed              = seed;
    options.temperature       = temperature;
    options.top_k             = top_k;
    options.top_p             = top_p;
    options.min_p             = min_p;
    options.repeat_penalty    = repeat_penalty;
    options.frequency_penalty = frequency_penalty;
    options.presence_penalty  = presence_penalty;
    options.penalty_last_n    = penalty_last_n;
    options.logit_bias        = std::move(logit_bias);
    options.grammar           = std::move(grammar);
    return std::make_unique<Sampler>(std::move(model), options);
}

static std::tuple<llama_token, float, std::vector<token_logprob>> sample(
    Sampler & sampler, Context & context, std::optional<size_t> n_top, llama_seq_id seq_id) {
    drawn_token result = sampler.sample(context, n_top, seq_id);
    return {result.drawn.first, result.drawn.second, std::move(result.most_probable)};
}

void register_sampler(py::module_ & m) {
    py::class_<Sampler>(m, "Sampler")
        .def(py::init(&make_sampler), py::arg("model"), py::kw_only(), py::arg("seed"), py::arg("temperature"),
            py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("repeat_penalty"),
            py::arg("frequency_penalty"), py::arg("presence_penalty"), py::arg("penalty_last_n"), py::arg("logit_bias"),
            py::arg("grammar"))
        .def("accept", &Sampler::accept, py::arg("tokens").noconvert())
        .def("sample", &sample, py::arg("context"), py::arg("n_top") = py::none(), py::arg("seq_id") = 0);
}

} // namespace lminf_python
