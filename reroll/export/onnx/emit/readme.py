"""The README of an exported directory: how to run its graphs."""

from __future__ import annotations

from typing import Any

_ONCE = """```python
import numpy as np, onnxruntime as ort

session = ort.InferenceSession("{file}")
outputs = session.run(None, {{{inputs}}})
```
"""

_CAUSAL = """```python
import numpy as np, onnxruntime as ort

session = ort.InferenceSession("{file}")
tokens = np.array([[1, 2, 3]])             # [batch, time], from the tokenizer
seen = np.ones_like(tokens)                # 0 where a batch is padded, on the left
kinds = {{"tensor(float)": np.float32, "tensor(float16)": np.float16}}
sizes = {{"batch_size": len(tokens), "past_sequence_length": 0}}
past = {{
    i.name: np.zeros([sizes.get(d, d) for d in i.shape], kinds[i.type])
    for i in session.get_inputs() if i.name.startswith("past_key_values")
}}
names = [o.name for o in session.get_outputs()]
for _ in range(20):
    feed = {{{feed}, **past}}
    out = dict(zip(names, session.run(None, feed)))
    tokens = out["logits"][:, -1:].argmax(-1)
    seen = np.concatenate([seen, np.ones_like(tokens)], 1)
    past = {{n: out[n.replace("past_key_values", "present")] for n in past}}
    print(tokens)
```

The first run is the prompt, of any length; each further run may bring any number of tokens.
"""

_WHOLE = """```python
import numpy as np, onnxruntime as ort

session = ort.InferenceSession("{file}")
tokens = np.array([[1, 2, 3]])             # [batch, time], from the tokenizer
for _ in range(20):
    seen = np.ones_like(tokens)            # 0 where a batch is padded, on the left
    logits = session.run(["logits"], {{{feed}}})[0]
    tokens = np.concatenate([tokens, logits[:, -1:].argmax(-1)], 1)
    print(tokens[:, -1:])
```

The model keeps no state: each run takes the whole sequence, and reads all of it again.
"""

_GENAI = """
With onnxruntime-genai (`genai_config.json` names {file}):

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""

_NO_GENAI = """
There is no genai_config.json: onnxruntime-genai does not know states such as these: {kinds}.
"""

_DRAFT = """The `draft` graphs are the model after `{passes}`.
That reads the same weights and proposes tokens, of which the model keeps its own:

```python
import reroll.onnx

tokens = reroll.onnx.load(".").generate([1, 2, 3], max_new_tokens=64)
```"""

_PARTS = {"encoder": ("This is the model's encoder; its decoder is not exported.", "")}


def readme(manifest: dict[str, Any], has_genai: bool) -> str:
    """Return the README's text from the manifest."""
    graphs = manifest["graphs"]
    kind = next((k for k in ("unrolled", "loop") if k in graphs), next(iter(graphs)))
    graph = graphs[kind]
    lines = [
        f"# {manifest['model']} in ONNX",
        "",
        f"Written by reroll {manifest['producer']['reroll']}"
        + (f" after `{', '.join(manifest['passes'])}`" if manifest["passes"] else "")
        + f"; precision {manifest['precision']}, opset {manifest['opset']}.",
        "",
        *_PARTS.get(manifest["part"], ()),
        *(line for remark in manifest["remarks"] for line in (f"Of the capture: {remark}.", "")),
        "| file | bytes | nodes | largest error against torch |",
        "| --- | --- | --- | --- |",
    ]
    for each in graphs.values():
        error = each.get("check", {}).get("relative_rms_error")
        said = "not checked" if error is None else f"{error:.1e} (relative RMS)"
        lines.append(f"| {each['file']} | {each['bytes']:,} | {each['nodes']} | {said} |")
    weights = manifest["weights"]
    lines.append(f"| {weights['file']} | {weights['bytes']:,} | | |")
    lines += ["", "All graphs read the one weight file: keep it beside them.", ""]
    if "draft" in manifest:
        lines += [_DRAFT.format(passes=", ".join(manifest["draft"]["passes"])), ""]
    names = [i["name"] for i in graph["inputs"] if not i["name"].startswith("past_key_values")]
    if manifest["decoding"]:
        feed = {
            "input_ids": "tokens",
            "attention_mask": "seen",
            "position_ids": "(seen.cumsum(1) - 1).clip(0)[:, -tokens.shape[1]:]",
        }
        given = ", ".join(f'"{n}": {feed[n]}' for n in names if n in feed)
        text = _CAUSAL if manifest["states"] else _WHOLE
        lines.append(text.format(file=graph["file"], feed=given))
    else:
        shapes = {i["name"]: i["shape"] for i in graph["inputs"]}
        given = "".join(f'\n    "{n}": ...,  # {shapes[n]}' for n in names)
        lines.append(_ONCE.format(file=graph["file"], inputs=f"{given}\n"))
    if has_genai:
        lines.append(_GENAI.format(file=graph["file"]))
    elif manifest["states"]:
        kinds = sorted({s["part"] for s in manifest["states"] if not s["grows"]})
        lines.append(_NO_GENAI.format(kinds=", ".join(kinds)))
    return "\n".join(lines)
