# Sets out to the folder of the pip package nvidia.<name>, or to "" if it is not installed. These are
# namespace packages, found without importing anything.
function(epcomm_pip_package out name)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "
import importlib.util, sys
try:
    spec = importlib.util.find_spec('nvidia.${name}')
except ModuleNotFoundError:
    spec = None
sys.stdout.write(list(spec.submodule_search_locations)[0] if spec else '')"
    OUTPUT_VARIABLE folder
    COMMAND_ERROR_IS_FATAL ANY)
  set(${out} "${folder}" PARENT_SCOPE)
endfunction()
