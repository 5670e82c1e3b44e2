# The CUDA part. Sets cuda_objects (empty if it is not built), cuda_definitions and cuda_libraries.
#
#   COMPACTER_CUDA=AUTO      is built for the NVIDIA GPUs of this machine, if it has any and nvcc
#   COMPACTER_CUDA=ON, OFF   must be built, for every architecture; is left out, as COMPACTER_NO_CUDA says
#   COMPACTER_CUDA_ARCHS     is built for these architectures, unless COMPACTER_CUDA is OFF
#   COMPACTER_CUDA_ON_CPU    is C++ that tests/cuda_on_cpu executes, for tests without nvcc and GPU
#
# nvcc is CMAKE_CUDA_COMPILER, CUDACXX, or on the path.
set(COMPACTER_CUDA AUTO CACHE STRING "The CUDA part: AUTO (for the GPUs of this machine), ON (for all) or OFF")
set(COMPACTER_NO_CUDA "left out by COMPACTER_CUDA=OFF" CACHE STRING "Why there is no CUDA part, where it is OFF")
set(COMPACTER_CUDA_ARCHS "" CACHE STRING "Architectures of the CUDA part, as CMAKE_CUDA_ARCHITECTURES has them")
option(COMPACTER_CUDA_ON_CPU "Compile the CUDA part as C++ that the CPU executes, for tests" OFF)

include(csrc/cuda/gpus.cmake)

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
set(cuda_element_sources ${cuda_sources})  # these have many instances, so each dtype of x is compiled by itself
list(FILTER cuda_element_sources INCLUDE REGEX "/((forward|backward)_general|family_(forward|backward|weights))\\.cu$")
list(REMOVE_ITEM cuda_sources ${cuda_element_sources})

set(cuda_objects)
set(cuda_libraries)
set(cuda_definitions)

# add_cuda(NAME SOURCES DEFINITIONS...)
function(add_cuda name sources)
  add_library(${name} OBJECT ${${sources}})
  target_compile_definitions(${name} PRIVATE ${ARGN})
  if(COMPACTER_CUDA_ON_CPU)
    set_source_files_properties(${${sources}} PROPERTIES LANGUAGE CXX)
    target_compile_definitions(${name} PRIVATE COMPACTER_CUDA_ON_CPU)
    target_compile_options(${name} PRIVATE -O1 -fno-strict-aliasing -ftrivial-auto-var-init=pattern
                           -Wno-unknown-pragmas "SHELL:-x c++"
                           "SHELL:-include ${CMAKE_SOURCE_DIR}/tests/cuda_on_cpu/cuda_on_cpu.h")
  endif()
  set(cuda_objects ${cuda_objects} $<TARGET_OBJECTS:${name}> PARENT_SCOPE)
endfunction()

function(add_all_cuda)
  add_cuda(cuda_host cuda_sources)
  foreach(element f32 bf16 f16)
    add_cuda(cuda_${element} cuda_element_sources COMPACTER_ELEMENT=${element})
  endforeach()
  set(cuda_objects ${cuda_objects} PARENT_SCOPE)
endfunction()

set(gpus)
set(cuda_missing)
if(COMPACTER_CUDA STREQUAL "AUTO")
  find_gpus(gpus)
endif()
if(COMPACTER_CUDA_ON_CPU)
  add_all_cuda()
  list(APPEND cuda_definitions COMPACTER_CUDA_ON_CPU)
elseif(COMPACTER_CUDA STREQUAL "OFF")
  set(cuda_missing "${COMPACTER_NO_CUDA}")
elseif(COMPACTER_CUDA STREQUAL "AUTO" AND NOT COMPACTER_CUDA_ARCHS AND NOT gpus)
  set(cuda_missing "no NVIDIA GPU was seen when it was built, COMPACTER_KERNELS_CUDA=1 builds it for all architectures")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_EXTENSIONS OFF)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
    if(COMPACTER_CUDA_ARCHS)
      set(CMAKE_CUDA_ARCHITECTURES ${COMPACTER_CUDA_ARCHS})
    else()
      choose_archs(CMAKE_CUDA_ARCHITECTURES "${gpus}")
    endif()
    add_all_cuda()
    string(REGEX REPLACE "-(real|virtual)" "" cuda_archs "${CMAKE_CUDA_ARCHITECTURES}")
    string(REPLACE ";" " " cuda_archs "${cuda_archs}")
    list(APPEND cuda_definitions COMPACTER_CUDA_ARCHS="${cuda_archs}")
    set(cuda_libraries CUDA::cudart_static -Wl,--exclude-libs,ALL)  # its symbols must not meet those of torch
  elseif(COMPACTER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "COMPACTER_CUDA=ON, but there is no nvcc; put it on the path, or its file name into CUDACXX")
  else()
    set(cuda_missing "nvcc was not found when it was built")
  endif()
endif()
if(cuda_objects)
  list(APPEND cuda_definitions COMPACTER_CUDA)
else()
  string(REPLACE ";" "," cuda_missing "${cuda_missing}")  # a semicolon would part the list
  list(APPEND cuda_definitions COMPACTER_NO_CUDA="${cuda_missing}")
endif()
