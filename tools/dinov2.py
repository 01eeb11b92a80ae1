"""DINOv2-small as a Hugging Face directory, rebuilt from the backbone inside an ONNX file.

The file is a saliency network whose backbone was exported from transformers' Dinov2Model. Biases
and norms kept their names; the matrices of linear layers did not, and are found by the node that
multiplies by them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from tools.errors import PrepareError

PREFIX = "backbone."

# of the inputs that the network was trained with
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert(source: Path, out: Path) -> None:
    """Write the backbone of the ONNX file `source` to the folder `out`, and compare the two."""
    network = onnx.load(source)
    out.mkdir(parents=True)
    # 518 pixels in patches of 14: the resolution of the position embeddings
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
        dtype=torch.float32,
    )
    config.save_pretrained(out)
    # the names in the file are those of a checkpoint on disk; in memory transformers 5 has others
    save_file(backbone_weights(network.graph), out / "model.safetensors", metadata={"format": "pt"})
    Path(out, "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
    check(out, network)


def backbone_weights(graph: onnx.GraphProto) -> dict[str, torch.Tensor]:
    """The backbone's weights in an ONNX graph, by their names in a checkpoint."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix(PREFIX): array
        for name, array in tensors.items()
        if name.startswith(PREFIX)
    }
    for name, array in multiplied_matrices(graph, tensors):
        weights[name] = array.T
    embeddings = "embeddings"
    weights[f"{embeddings}.position_embeddings"] = np.concatenate(
        [  # [1, 1, width] of the class token, [1, patches, width] of the image
            constant_input(graph, tensors, f"/backbone/{embeddings}/Concat_6"),
            constant_input(graph, tensors, f"/backbone/{embeddings}/Reshape_1"),
        ],
        axis=1,
    )
    # training alone uses it, and the export dropped it
    weights[f"{embeddings}.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    return {name: torch.tensor(array).contiguous() for name, array in weights.items()}


def multiplied_matrices(
    graph: onnx.GraphProto, tensors: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each linear layer's weight name and its matrix, [inputs, outputs]."""
    for node in graph.node:
        in_layer = node.name.startswith("/backbone/encoder/layer.")
        if in_layer and node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            yield f"{module.replace('/', '.')}.weight", tensors[node.input[1]]


def constant_input(
    graph: onnx.GraphProto, tensors: dict[str, np.ndarray], node_name: str
) -> np.ndarray:
    """The first stored tensor among the inputs of a node."""
    for node in graph.node:
        if node.name == node_name:
            for name in node.input:
                if name in tensors:
                    return tensors[name]
    raise unexpected(f"no node {node_name} with a stored input")


def check(folder: Path, network: onnx.ModelProto) -> None:
    """Compare the saved model with the ONNX backbone on a random image batch."""
    model, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise unexpected(f"weights do not fit: {loading}")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = backbone_output(network, pixels)  # [batch, 1 + patches, width]
    with torch.no_grad():
        actual = model.eval()(pixel_values=pixels).last_hidden_state
    error = ((actual - expected).norm() / expected.norm()).item()
    # fp32 on one processor, through twelve layers and two implementations
    if not error < 1e-5:
        raise unexpected(f"the rebuilt model is {error:.1e} (relative) from its ONNX graph")


def backbone_output(network: onnx.ModelProto, pixels: torch.Tensor) -> torch.Tensor:
    """The hidden states after the backbone's last norm, computed by ONNX Runtime."""
    # the nodes that add the bias of the norm after the last layer
    norm = "/backbone/layernorm/Add_1"
    outputs = [node.output[0] for node in network.graph.node if node.name.startswith(norm)]
    if len(outputs) != 1:
        raise unexpected(f"{len(outputs)} final norms")
    hidden = onnx.helper.make_tensor_value_info(outputs[0], onnx.TensorProto.FLOAT, None)
    network.graph.output.append(hidden)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        network.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(outputs, {"input_image": pixels.numpy()})
    return torch.from_numpy(result)


def unexpected(what: str) -> PrepareError:
    """The error for an ONNX file that is not the one this was written for."""
    return PrepareError(
        f"DINOv2 in ONNX: {what}",
        "use the pinned package and library versions, or adapt tools/dinov2.py to the new ones",
    )
