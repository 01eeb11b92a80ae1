"""Two processes share the weights of a converted model by FSDP2, and save what they train."""

import os
import socket

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import reroll
from tests.runtime.models.test_backbone import lowered
from tests.slow import slow

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(path, trips_together):
    model = AutoModelForCausalLM.from_pretrained(path)
    mesh = init_device_mesh("cpu", (2,))
    trips = model.trip_modules()
    for group in [trips] if trips_together else trips:
        fully_shard(group, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank, port, path, trips_together):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        tokens = torch.arange(3, 15)[None]
        wanted = AutoModelForCausalLM.from_pretrained(path)(tokens).logits
        model = sharded(path, trips_together)
        output = model(tokens, labels=tokens)
        torch.testing.assert_close(output.logits, wanted, rtol=1e-6, atol=1e-6)
        output.loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        trained = model(tokens).logits.detach()
        assert not torch.allclose(trained, wanted, atol=1e-3)
        state = get_model_state_dict(model, options=WHOLE)
        again = sharded(path, trips_together)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # this changes the dict that it is given
        set_model_state_dict(again, dict(state), options=options)
        torch.testing.assert_close(again(tokens).logits, trained, rtol=1e-6, atol=1e-6)
        if rank == 0:
            plain = AutoModelForCausalLM.from_pretrained(path)
            plain.load_state_dict(state)
            plain.save_pretrained(path.parent / "trained")
            torch.save(trained, path.parent / "logits.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["delta", "exits", *slow("rolled", "relaxed")])
def test_two_processes_share_the_weights(kind, tmp_path):
    lowered(kind).save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # trips that share weights are one group, as fully_shard requires
    arguments = (port, tmp_path / "model", kind == "relaxed")
    multiprocessing.spawn(work, arguments, nprocs=2)
    again = reroll.load(tmp_path / "trained").to_module()
    logits = torch.load(tmp_path / "logits.pt")
    tokens = torch.arange(3, 15)[None]
    torch.testing.assert_close(again(tokens).logits, logits, rtol=1e-6, atol=1e-6)
