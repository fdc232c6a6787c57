# One object library an instruction set. A row is built when the compiler, with the row's flags, accepts the probe,
# which uses an intrinsic of that set: this asks for the architecture, the compiler and the assembler in one go.
#
# Sets EDGECOLBERT_ISAS (names) and EDGECOLBERT_ISA_TARGETS, and the target `isa_objects`, which builds all of them and
# leaves their names and paths, one "name path" a line, in <build folder>/isa_objects.txt.

include(CheckCXXSourceCompiles)

set(EDGECOLBERT_ISAS)
set(EDGECOLBERT_ISA_TARGETS)
set(isa_objects_text "")
add_custom_target(isa_objects)

function(edgecolbert_probe variable flags body)
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  set(CMAKE_REQUIRED_QUIET ON)
  check_cxx_source_compiles("${body}" ${variable})
endfunction()

macro(edgecolbert_isa name flags probe)
  edgecolbert_probe(EDGECOLBERT_BUILDS_${name} "${flags}" "${probe}")
  if(EDGECOLBERT_BUILDS_${name})
    set(target edgecolbert_isa_${name})
    add_library(${target} OBJECT csrc/cpu/isa/${name}.cpp)
    separate_arguments(flag_list UNIX_COMMAND "${flags}")
    # Nothing here throws, and the tables of exceptions would bring a weak symbol. errno and floating-point traps are never
    # looked at. Not -ffast-math: NaN, Inf and signed zeros keep their meaning.
    # Aligned functions keep the place of a hot loop, and so its speed, independent of the code before it.
    target_compile_options(${target} PRIVATE ${flag_list}
        -fno-exceptions -fno-math-errno -fno-trapping-math -falign-functions=64)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # gcc's own AVX-512 intrinsics start from a deliberately undefined register (gcc bug 105593).
      target_compile_options(${target} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
      if(${name} MATCHES neon)
        # Before it assigns registers gcc moves loads so far up that accumulators leave theirs: a tile of 96 multiply-adds
        # had 50 stores and loads of them.
        target_compile_options(${target} PRIVATE -fno-schedule-insns)
      endif()
    endif()
    target_link_libraries(${target} PUBLIC edgecolbert_options)
    add_dependencies(isa_objects ${target})
    list(APPEND EDGECOLBERT_ISAS ${name})
    list(APPEND EDGECOLBERT_ISA_TARGETS ${target})
    string(APPEND isa_objects_text "${name} $<TARGET_OBJECTS:${target}>\n")
  endif()
endmacro()

set(x86 "#include <immintrin.h>\n")
set(avx2_flags "-mavx2 -mfma -mf16c")
set(avx512_flags "${avx2_flags} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512")

edgecolbert_isa(scalar "" "int f() { return 0; }")
edgecolbert_isa(avx2 "${avx2_flags}"
  "${x86} __m256 f(__m256 a, __m128i b) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(b)); }")
edgecolbert_isa(avxvnni "${avx2_flags} -mavxvnni"
  "${x86} __m256i f(__m256i a) { return _mm256_dpwssd_avx_epi32(a, a, a); }")
edgecolbert_isa(avx512 "${avx512_flags}"
  "${x86} __m512i f(__m512i a, __m512i b) { return _mm512_madd_epi16(a, b); }")
edgecolbert_isa(avx512vnni "${avx512_flags} -mavx512vnni"
  "${x86} __m512i f(__m512i a) { return _mm512_dpwssd_epi32(a, a, a); }")
edgecolbert_isa(avx512vnni_fp16 "${avx512_flags} -mavx512vnni -mavx512fp16"
  "${x86} __m512h f(__m512h a) { return _mm512_fmadd_ph(a, a, a); }")
edgecolbert_isa(neon_dotprod "-march=armv8.2-a+dotprod+fp16"
  "#include <arm_neon.h>
  int32x4_t f(int32x4_t a, int8x16_t b) { return vdotq_s32(a, b, b); }
  float16x8_t g(float16x8_t a) { return vmulq_f16(a, a); }")
edgecolbert_isa(neon ""
  "#include <arm_neon.h>
  #ifndef __aarch64__
  #error the NEON kernels are AArch64
  #endif
  float32x4_t f(float32x4_t a) { return vfmaq_f32(a, a, a); }")

message(STATUS "Instruction sets: ${EDGECOLBERT_ISAS}")
file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/isa_objects.txt CONTENT "${isa_objects_text}")
