#include "log.h"

#include "llama.h"

#include <algorithm>
#include <cstdio>

namespace lminf_python {

static thread_local log_scope * innermost = nullptr;

static constexpr size_t n_kept = 2000; // bytes of log text kept for a message

log_scope::log_scope(bool verbose) : verbose(verbose), outer(innermost) {
    innermost = this;
}

log_scope::~log_scope() {
    innermost = outer;
}

void receive_log(int level, const char * text) {
    log_scope * scope = innermost;
    // outside any scope nobody else would report an error
    if (scope ? scope->verbose : level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
        std::fflush(stderr);
    }
    if (!scope) {
        return;
    }
    if (level == GGML_LOG_LEVEL_ERROR && scope->errors.size() < n_kept) {
        scope->errors += text;
    } else if (level == GGML_LOG_LEVEL_WARN && scope->warnings.size() < n_kept) {
        scope->warnings += text;
    }
}

// "llama_model_load: error loading model: X\n" -> "error loading model: X", lines joined by "; "
static std::string tidy(const std::string & lines) {
    std::string result;
    for (size_t begin = 0; begin < lines.size();) {
        const size_t end  = std::min(lines.find('\n', begin), lines.size());
        std::string  line = lines.substr(begin, end - begin);
        const size_t head = line.find(": ");
        if (head != std::string::npos && line.find(' ') > head) {
            line = line.substr(head + 2);
        }
        if (!line.empty()) {
            result += (result.empty() ? "" : "; ") + line;
        }
        begin = end + 1;
    }
    return result;
}

std::string log_scope::summary() const {
    return tidy(errors.empty() ? warnings : errors);
}

std::string log_scope::explain(const std::string & reason) const {
    const std::string logged = summary();
    return logged.empty() ? reason : reason + " (llama.cpp: " + logged + ")";
}

void install_log_callback() {
    llama_log_set([](ggml_log_level level, const char * text, void *) { receive_log(level, text); }, nullptr);
}

} // namespace lminf_python
