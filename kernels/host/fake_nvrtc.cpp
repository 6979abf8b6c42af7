// A CUDA compiler that compiles nothing: a libnvrtc.so.12 for the fake driver, which needs no image.
//
// The result, PTX and cubin alike, is `fake-cubin:` and a hash of source and options, so that a cache of results can be
// tested. With SAFEGENE_FAKE_NVRTC=fail every compilation fails, with a log.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

enum : int {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_COMPILATION = 6,
};

constexpr int ARCHITECTURES[] = {75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121};

struct Program {
    std::string source;
    std::string result;
    std::string log;
};

// 64-bit FNV-1a; the zero byte at the end is part of it, so that "ab" "c" is not "a" "bc".
uint64_t hash(uint64_t state, const char* text) {
    const size_t bytes = std::strlen(text) + 1;
    for (size_t i = 0; i < bytes; ++i) state = (state ^ static_cast<unsigned char>(text[i])) * 0x100000001b3;
    return state;
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

API int nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 9;
    return NVRTC_SUCCESS;
}

API const char* nvrtcGetErrorString(int code) {
    switch (code) {
    case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
    case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
    default: return "NVRTC_ERROR unknown";
    }
}

API int nvrtcGetNumSupportedArchs(int* count) {
    *count = static_cast<int>(sizeof ARCHITECTURES / sizeof *ARCHITECTURES);
    return NVRTC_SUCCESS;
}

API int nvrtcGetSupportedArchs(int* out) {
    std::memcpy(out, ARCHITECTURES, sizeof ARCHITECTURES);
    return NVRTC_SUCCESS;
}

API int nvrtcCreateProgram(Program** out, const char* source, const char*, int, const char* const*,
                           const char* const*) {
    if (!out || !source) return NVRTC_ERROR_INVALID_INPUT;
    *out = new Program{source, "", ""};
    return NVRTC_SUCCESS;
}

API int nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return NVRTC_ERROR_INVALID_PROGRAM;
    delete *program; // the pointer may be in memory that is not ours to change
    return NVRTC_SUCCESS;
}

API int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
    const char* wish = std::getenv("SAFEGENE_FAKE_NVRTC");
    if (wish && std::strcmp(wish, "fail") == 0) {
        program->log = "kernels.cu(1): error: this compiler was asked to fail\n\n1 error detected\n";
        return NVRTC_ERROR_COMPILATION;
    }
    uint64_t state = hash(0xcbf29ce484222325, program->source.c_str());
    for (int i = 0; i < count; ++i) state = hash(state, options[i]);
    char text[48];
    std::snprintf(text, sizeof text, "fake-cubin:%016llx", static_cast<unsigned long long>(state));
    program->result = text;
    return NVRTC_SUCCESS;
}

// Text goes out with its zero byte, a cubin without.
#define RESULT(function, field, bytes)                                                         \
    API int function##Size(const Program* program, size_t* out) {                              \
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;                                      \
        *out = bytes;                                                                          \
        return NVRTC_SUCCESS;                                                                  \
    }                                                                                          \
    API int function(const Program* program, char* out) {                                      \
        if (!program) return NVRTC_ERROR_INVALID_PROGRAM;                                      \
        std::memcpy(out, program->field.c_str(), bytes);                                       \
        return NVRTC_SUCCESS;                                                                  \
    }
RESULT(nvrtcGetPTX, result, program->result.size() + 1)
RESULT(nvrtcGetCUBIN, result, program->result.size())
RESULT(nvrtcGetProgramLog, log, program->log.size() + 1)
