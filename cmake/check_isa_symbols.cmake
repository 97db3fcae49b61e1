# Fails when an ISA's objects define a symbol outside that ISA's namespace: the linker could keep, say, an AVX-512
# copy of a shared inline function for the whole library, and the baseline would crash on an older CPU.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --extern-only ${object} OUTPUT_VARIABLE symbols RESULT_VARIABLE rc)
  if(NOT rc EQUAL 0)
    message(FATAL_ERROR "nm failed on ${object}")
  endif()
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol AND NOT symbol MATCHES "isa_${ISA}")
      message(FATAL_ERROR "${object} defines a symbol outside namespace isa_${ISA}: ${symbol}")
    endif()
  endforeach()
endforeach()
