// llama.cpp reports why something failed in its log only: keep those lines for exception messages, and off the
// terminal.

#pragma once

#include <string>

namespace lminf_python {

// Collects the warnings and errors that llama.cpp logs on this thread while the scope lives.
// With verbose, every line goes to standard error too. Scopes nest; the innermost one collects.
class log_scope {
public:
    explicit log_scope(bool verbose);
    ~log_scope();

    log_scope(const log_scope &)             = delete;
    log_scope & operator=(const log_scope &) = delete;

    // The errors logged so far, or the warnings if there are none, without llama.cpp's function names. "" if there are
    // neither.
    std::string summary() const;

    // "reason (llama.cpp: ...)", or only the reason when nothing was logged.
    std::string explain(const std::string & reason) const;

private:
    friend void receive_log(int level, const char * text);

    const bool  verbose;
    log_scope * outer;
    std::string errors;
    std::string warnings;
};

// Called once, by register_backend.cpp.
void install_log_callback();

} // namespace lminf_python
