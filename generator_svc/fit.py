"""`python -m generator_svc.fit [TAKEN]`: a generator's memory plan, made without loading the model.

Reads the generator's settings. TAKEN is a JSON object with the bytes that others are going to take,
by device: {"cpu": 0, "cuda": 0}. Writes the plan as a JSON object; what cannot be served is refused
in the words of the generator itself.
"""

import json
import logging
import sys

from generator_svc.config import GeneratorSettings
from generator_svc.cuda import CudaError
from generator_svc.device import DeviceError, choose_device
from generator_svc.memory_plan import MemoryPlan, MemoryPlanError, plan_on
from trivium.model_directory import ModelDirectory, ModelDirectoryError, load_model_directory
from trivium.wire.settings import load_settings, refuse_to_start


def main() -> None:
    """Exits 0 where the model fits, 2 where it does not."""
    logging.basicConfig(format="generator_svc: %(message)s", level=logging.WARNING)
    settings = load_settings(GeneratorSettings)
    taken = json.loads(sys.argv[1]) if sys.argv[1:] else {}
    try:
        model = load_model_directory(settings.model_directory)
        device, plan = _plan(settings, model, taken)
    except (ModelDirectoryError, MemoryPlanError, DeviceError, CudaError) as error:
        refuse_to_start(f"generator_svc: {error}")
    told = {"device": device, "needed_bytes": plan.needed_bytes, "text": f"{model.id}: {plan}"}
    print(json.dumps(told))


def _plan(
    settings: GeneratorSettings, model: ModelDirectory, taken: dict[str, int]
) -> tuple[str, MemoryPlan]:
    """Device and plan, with the generator's fallback from CUDA to the CPU."""
    device = choose_device(settings.device)
    try:
        return device, plan_on(device, settings, model, taken.get(device, 0))
    except CudaError:
        if settings.device != "auto":
            raise
        return "cpu", plan_on("cpu", settings, model, taken.get("cpu", 0))


if __name__ == "__main__":
    main()
