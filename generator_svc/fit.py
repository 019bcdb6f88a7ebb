"""`python -m generator_svc.fit [RESERVED]`: a generator's memory plan, without loading the model.

Reads the generator's settings. RESERVED is a JSON object with the bytes to leave to other
processes, by device: {"cpu": 0, "cuda": 0}. Prints the plan as a JSON object. A model that cannot
be served is refused with the generator's own error message; if memory is what it lacks, the memory
it would need is still printed.
"""

import json
import logging
import sys

from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError
from generator_svc.device import DeviceError, choose_device
from generator_svc.memory_plan import MemoryPlanError, plan_on
from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory
from trivium.wire.settings import load_settings, refuse_to_start


def main() -> None:
    """Exits with 0 if the model fits, 2 if it does not."""
    logging.basicConfig(format="generator_svc: %(message)s", level=logging.WARNING)
    settings = load_settings(GeneratorSettings)
    reserved = json.loads(sys.argv[1]) if sys.argv[1:] else {}
    try:
        model = load_model_directory(settings.model_directory)
        device = choose_device(settings.device)
        try:
            _print_plan(settings, model, device, reserved)
        except CudaError:  # falls back to the CPU, as the generator does
            if settings.device != "auto":
                raise
            _print_plan(settings, model, "cpu", reserved)
    except (ModelDirectoryError, MemoryPlanError, DeviceError, CudaError) as error:
        refuse_to_start(f"generator_svc: {error}")


def _print_plan(
    settings: GeneratorSettings, model: ModelDirectory, device: str, reserved: dict[str, int]
) -> None:
    try:
        plan = plan_on(device, settings, model, reserved.get(device, 0))
    except MemoryPlanError as error:
        print(json.dumps({"device": device, "needed_bytes": error.needed_bytes}))
        raise
    summary = {"device": device, "needed_bytes": plan.needed_bytes, "text": f"{model.id}: {plan}"}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
