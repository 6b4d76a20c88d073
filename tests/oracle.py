"""The official SparK semantics, restated plainly: dense arrays, multiplied by the mask after every operator.

Written from the paper (arXiv 2301.03580) and the facts about the official code, for ResNet and ConvNeXt, as pure
functions of a dictionary of parameters. Slow and obvious; shares no code with the package.
"""

import torch
import torch.nn.functional as F


def mask_at(visible, h, w):
    fh, fw = visible.shape[2:]
    return visible.repeat_interleave(h // fh, 2).repeat_interleave(w // fw, 3)


def times_mask(x, visible):
    return x * mask_at(visible, *x.shape[2:])


def conv(p, name, x, visible, stride=1, padding=0, groups=1):
    out = F.conv2d(x, p[f"{name}.weight"], p.get(f"{name}.bias"), stride, padding, 1, groups)
    return times_mask(out, visible)


def batch_norm(p, name, x, visible, stats, eps=1e-5, momentum=0.1):
    mask = mask_at(visible, *x.shape[2:])
    count = mask.sum()
    mean = (x * mask).sum((0, 2, 3)) / count
    centred = (x - mean[None, :, None, None]) * mask
    var = centred.square().sum((0, 2, 3)) / count
    with torch.no_grad():
        old_mean, old_var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        stats[f"{name}.running_mean"] = (1 - momentum) * old_mean + momentum * mean
        stats[f"{name}.running_var"] = (1 - momentum) * old_var + momentum * var * count / (count - 1)
    out = centred / (var + eps).sqrt()[None, :, None, None]
    out = out * p[f"{name}.weight"][None, :, None, None] + p[f"{name}.bias"][None, :, None, None]
    return out * mask


def layer_norm(p, name, x, visible, eps=1e-6):
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    out = (x - mean) / (var + eps).sqrt()
    out = out * p[f"{name}.weight"][None, :, None, None] + p[f"{name}.bias"][None, :, None, None]
    return times_mask(out, visible)


def linear(p, name, x, visible):
    out = torch.einsum("bchw,dc->bdhw", x, p[f"{name}.weight"]) + p[f"{name}.bias"][None, :, None, None]
    return out


def resnet(p, x, visible, stats, layers, bottleneck):
    """timm ResNet: 7x7 stem, max pool, four stages. -> features at strides 4, 8, 16, 32."""
    x = F.relu(batch_norm(p, "bn1", conv(p, "conv1", x, visible, 2, 3), visible, stats))
    x = times_mask(F.max_pool2d(x, 3, 2, 1), visible)
    features = []
    for s, depth in enumerate(layers, start=1):
        for i in range(depth):
            name = f"layer{s}.{i}"
            stride = 2 if s > 1 and i == 0 else 1
            identity = x
            if bottleneck:
                y = F.relu(batch_norm(p, f"{name}.bn1", conv(p, f"{name}.conv1", x, visible), visible, stats))
                y = conv(p, f"{name}.conv2", y, visible, stride, 1)
                y = F.relu(batch_norm(p, f"{name}.bn2", y, visible, stats))
                y = batch_norm(p, f"{name}.bn3", conv(p, f"{name}.conv3", y, visible), visible, stats)
            else:
                y = conv(p, f"{name}.conv1", x, visible, stride, 1)
                y = F.relu(batch_norm(p, f"{name}.bn1", y, visible, stats))
                y = batch_norm(p, f"{name}.bn2", conv(p, f"{name}.conv2", y, visible, 1, 1), visible, stats)
            if f"{name}.downsample.0.weight" in p:
                identity = conv(p, f"{name}.downsample.0", x, visible, stride)
                identity = batch_norm(p, f"{name}.downsample.1", identity, visible, stats)
            x = F.relu(y + identity)
        features.append(x)
    return features


def convnext(p, x, visible, depths):
    """timm ConvNeXt (v1): 4x4 stem, norm before each 2x2 downsampling. -> features at strides 4, 8, 16, 32."""
    x = layer_norm(p, "stem.1", conv(p, "stem.0", x, visible, 4), visible)
    features = []
    for s, depth in enumerate(depths):
        if s > 0:
            x = layer_norm(p, f"stages.{s}.downsample.0", x, visible)
            x = conv(p, f"stages.{s}.downsample.1", x, visible, 2)
        for i in range(depth):
            name = f"stages.{s}.blocks.{i}"
            y = conv(p, f"{name}.conv_dw", x, visible, 1, 3, groups=x.shape[1])
            y = layer_norm(p, f"{name}.norm", y, visible)
            if (
                p[f"{name}.mlp.fc1.weight"].ndim == 4
            ):  # timm's conv_mlp: the same linear layers as 1x1 convolutions
                p = {
                    **p,
                    **{
                        f"{name}.mlp.{k}.weight": p[f"{name}.mlp.{k}.weight"].flatten(1)
                        for k in ("fc1", "fc2")
                    },
                }
            y = linear(p, f"{name}.mlp.fc2", F.gelu(linear(p, f"{name}.mlp.fc1", y, visible)), visible)
            y = y * p[f"{name}.gamma"][None, :, None, None]
            x = x + times_mask(y, visible)
        features.append(x)
    return features


def dense_batch_norm(p, name, x):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    out = (x - mean[None, :, None, None]) / (var + 1e-5).sqrt()[None, :, None, None]
    return out * p[f"{name}.weight"][None, :, None, None] + p[f"{name}.bias"][None, :, None, None]


def patchify(images, size):
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // size, size, w // size, size)
    return torch.einsum("bchpwq->bhwpqc", x).reshape(b, (h // size) * (w // size), size * size * c)


def spark(p, images, visible, encode, norm, patch=32):
    """-> (loss, prediction, new running statistics of the encoder and of the densify norms).

    Args:
        p: every parameter and buffer of the model, by name ("encoder.", "densify.", "decoder.").
        images: [B, C, H, W].
        visible: [B, 1, fh, fw] bool.
        encode: (encoder parameters, masked images, visible, stats) -> four features, shallow first.
        norm: "bn" or "ln", of the densify step.
        patch: [px].
    """
    stats = {}
    encoder = {k.removeprefix("encoder."): v for k, v in p.items() if k.startswith("encoder.")}
    masked = times_mask(images, visible)
    features = encode(encoder, masked, visible, stats)[::-1]
    stats = {f"encoder.{k}": v for k, v in stats.items()}
    x = 0
    for i, feature in enumerate(features):
        name = f"densify.{i}.norm"
        y = (
            layer_norm(p, name, feature, visible)
            if norm == "ln"
            else batch_norm(p, name, feature, visible, stats)
        )
        y = torch.where(mask_at(visible, *y.shape[2:]).expand_as(y), y, p[f"densify.{i}.token"].expand_as(y))
        if f"densify.{i}.projection.weight" in p:
            weight = p[f"densify.{i}.projection.weight"]
            y = F.conv2d(y, weight, p[f"densify.{i}.projection.bias"], padding=weight.shape[-1] // 2)
        x = decoder_block(p, f"decoder.blocks.{i}", x + y)
    block = len(features)
    while f"decoder.blocks.{block}.upsample.weight" in p:
        x = decoder_block(p, f"decoder.blocks.{block}", x)
        block += 1
    prediction = F.conv2d(x, p["decoder.head.weight"], p["decoder.head.bias"])

    wanted, got = patchify(images, patch), patchify(prediction, patch)
    wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((got - wanted) ** 2).mean(2)
    hidden = visible.logical_not().flatten(1).to(error.dtype)
    loss = (error * hidden).sum() / (hidden.sum() + 1e-8)
    return loss, prediction, stats


def decoder_block(p, name, x):
    x = F.conv_transpose2d(x, p[f"{name}.upsample.weight"], p[f"{name}.upsample.bias"], 2, 1)
    x = F.conv2d(x, p[f"{name}.conv1.weight"], padding=1)
    x = F.relu6(dense_batch_norm(p, f"{name}.norm1", x))
    x = F.conv2d(x, p[f"{name}.conv2.weight"], padding=1)
    return dense_batch_norm(p, f"{name}.norm2", x)
