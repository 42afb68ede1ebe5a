"""The real model with the adapter that comes with the package. Skipped where either is missing."""

import pytest

from fastmem.experiments.llm_memory_full import says
from fastmem.models import MemoryAugmentedModel, MemoryDirectory, smollm2
from fastmem.models.memory_augmented_model import PACKAGED_ADAPTER

if not (PACKAGED_ADAPTER / "memory_config.json").is_file():
    pytest.skip("the adapter is not there", allow_module_level=True)
if not (smollm2.cache_dir() / smollm2.FOLDER).is_dir():
    pytest.skip("SmolLM2 is not in the cache", allow_module_level=True)
pytest.importorskip("transformers")

NAME = "What is my name?"


@pytest.fixture(scope="module")
def loaded():
    return MemoryAugmentedModel.default(max_new_tokens=16)


@pytest.fixture
def model(loaded):
    loaded.clear_memory()
    return loaded


def ask(model, question, session="default"):
    return model.generate(question, update_memory=False, session=session)[0]


def test_recall_from_a_file(model, tmp_path):
    model.generate("Hello! My name is Alice. Please remember my name.")
    model.generate("I live in Lisbon.")
    model.save_memory(tmp_path / "m.memory")
    model.clear_memory()
    assert not says(ask(model, NAME), "Alice")
    model.load_memory(tmp_path / "m.memory")
    assert says(ask(model, NAME), "Alice")
    assert says(ask(model, "Where do I live?"), "Lisbon")


def test_a_correction(model):
    model.generate("My name is Alice.")
    model.generate("No, I am Sarah.")
    answer = ask(model, NAME)
    assert says(answer, "Sarah") and not says(answer, "Alice")


def test_users_do_not_meet(model, tmp_path):
    store = MemoryDirectory(tmp_path, model)
    for session, name in (("a", "Alice"), ("b", "Robert")):
        with store.open(session):
            model.generate(f"Hello! My name is {name}.", session=session)
    for session, own, other in (("a", "Alice", "Robert"), ("b", "Robert", "Alice")):
        with store.open(session, save=False):
            answer = ask(model, NAME, session)
        assert says(answer, own) and not says(answer, other)


def test_what_is_held_has_words(model):
    model.generate("Hello! My name is Alice.")
    assert " Alice" in {row["token"] for row in model.held(top=20) if row["tier"] == "store"}


def test_the_adapter_is_small():
    assert sum(p.stat().st_size for p in PACKAGED_ADAPTER.iterdir()) < 10e6
