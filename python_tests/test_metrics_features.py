"""Feature networks, the pass over images, its cache, shared work."""

import shutil
import weakref

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from gankern.data import Dataset, open_dataset
from gankern.metrics import (
    DatasetImages,
    FolderImages,
    GeneratedImages,
    MetricsError,
    extract,
    load_extractor,
    module_extractor,
)
from gankern.metrics.features import cache_path
from gankern.metrics.frechet import FeatureStatistics, feature_statistics
from gankern.metrics.inception import InceptionV3, tf1_resize
from gankern.models import dcgan


def fidelity(module):
    """A module of torch-fidelity, which cannot be imported without a torchvision that fits."""
    try:
        return __import__(f"torch_fidelity.{module}", fromlist=["x"])
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity (extra 'oracles') cannot be imported: {error}")


# The feature networks.


def test_tf1_resize():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    y = tf1_resize(x, (4, 6))
    row = torch.tensor([0, 0.5, 1, 1.5, 2, 2])
    torch.testing.assert_close(y[0, 0], torch.stack([row, row + 1.5, row + 3, row + 3]))
    z = torch.rand(2, 3, 9, 9)
    assert torch.equal(tf1_resize(z, (9, 9)), z)


def random_inception(seed=0):
    torch.manual_seed(seed)
    net = InceptionV3()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return net


def test_inception_agrees_with_torch_fidelity(tmp_path):
    module = fidelity("feature_extractor_inceptionv3")
    path = tmp_path / "weights.pth"
    torch.save(random_inception().state_dict(), path)
    oracle = module.FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(path),
    )
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    features, logits = oracle(images)
    ours, our_logits = load_extractor(path)(images)
    torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)


def test_inception_of_a_state_dict(tmp_path):
    net = random_inception()
    # torchvision's network has 23,834,568 without its auxiliary head; 8 outputs are added.
    assert sum(p.numel() for p in net.parameters()) == 23_834_568 + 8 * 2049
    state = net.state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "a.pth")
    save_file(state | {"AuxLogits.fc.weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    x = torch.randint(0, 256, (1, 1, 20, 20), dtype=torch.uint8)
    wanted, _ = net(x.expand(-1, 3, -1, -1))
    for name in ("a.pth", "b.safetensors"):
        extractor = load_extractor(tmp_path / name)
        assert extractor.label("fd") == "FID"
        torch.testing.assert_close(extractor(x)[0], wanted)


class Scripted(nn.Module):
    """A stand-in with the call of inception-2015-12-05.pt."""

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        y = x.float().mean((2, 3))
        if return_features:
            return y
        if no_output_bias:
            return y.softmax(1)
        return y + 1


class Means(nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


def test_torchscript(tmp_path):
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.jit.script(Scripted()).save(str(tmp_path / "inception-2015-12-05.pt"))
    extractor = load_extractor(tmp_path / "inception-2015-12-05.pt")
    assert extractor.label("kd") == "KID"
    features, logits = extractor(x)
    torch.testing.assert_close(features, x.float().mean((2, 3)))
    torch.testing.assert_close(logits.softmax(1), features.softmax(1))
    torch.jit.script(Means()).save(str(tmp_path / "mine.pt"))
    extractor = load_extractor(tmp_path / "mine.pt")
    assert extractor.label("fd") == "FD-mine"
    assert extractor(x)[1] is None


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"x" * 100), "not a network's weights"),
        (lambda p: torch.save({"x": torch.zeros(3)}, p), "Conv2d_1a_3x3.conv.weight must be"),
        (lambda p: torch.save([1], p), "must be a dictionary of tensors, got list"),
        (lambda p: torch.save(Evil(str(p) + ".ran"), p), "not a network's weights"),
        (
            lambda p: torch.save(
                InceptionV3().state_dict() | {"fc.weight": torch.zeros(1000, 2048)}, p
            ),
            r"fc.weight must be \[1008, 2048\], got \[1000, 2048\] \(the ImageNet network",
        ),
    ],
    ids=["missing", "junk", "other", "list", "code", "torchvision"],
)
def test_files_that_are_no_network(make, text, tmp_path):
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(MetricsError, match=text):
        load_extractor(path)
    assert not (tmp_path / "weights.pth.ran").exists()


@pytest.fixture(scope="module")
def embedded():
    return load_extractor("efficientnet-lite0")


def test_embedded_is_never_called_fid(embedded):
    assert embedded.label("fd") == "FD-EffLite0"
    assert embedded.label("kd") == "KD-EffLite0"
    assert embedded.label("is") == "IS-EffLite0"
    features, logits = embedded(torch.randint(0, 256, (2, 4, 28, 28), dtype=torch.uint8))
    assert features.shape == (2, 1280)
    assert logits.shape == (2, 1000)
    assert features.isfinite().all()
    assert module_extractor(Means(), "Inception").label("fd") == "FD-Inception"
    named = module_extractor(Means(), "FID")
    assert named.label("fd") == "FD-FID"


# The pass over images and its cache.


def small_digits(n=60):
    digits = open_dataset("digits")
    index = np.arange(0, len(digits), len(digits) // n)[:n]
    return Dataset(digits.images[index], digits.labels[index], "small", digits.class_names)


class Counting(nn.Module):
    """Pools the image to 4 x 4, and counts what it has seen."""

    seen = 0
    most = 0

    def forward(self, x):
        Counting.seen += len(x)
        Counting.most = max(Counting.most, len(x))
        return nn.functional.adaptive_avg_pool2d(x[:, :1].float(), 4).flatten(1)


def test_real_features_are_made_once(tmp_path):
    extractor = module_extractor(Counting())
    data = small_digits()
    Counting.seen = Counting.most = 0
    first = extract(DatasetImages(data), extractor, batch=7, cache=tmp_path)
    assert (Counting.seen, Counting.most) == (60, 7)
    again = extract(DatasetImages(data), extractor, batch=50, cache=tmp_path)
    assert Counting.seen == 60
    assert torch.equal(first.features, again.features)
    assert torch.equal(again.labels, torch.from_numpy(data.labels))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])  # damaged: made again
    assert torch.equal(
        extract(DatasetImages(data), extractor, cache=tmp_path).features, first.features
    )
    assert Counting.seen == 120
    extract(DatasetImages(data, 30), extractor, cache=tmp_path)
    assert Counting.seen == 150
    assert len(list(tmp_path.iterdir())) == 2


class Many:
    """50,000 images, and how many of them there are at a time."""

    name, identity, labels = "many", "", None
    alive = most = 0

    def __len__(self):
        return 50_000

    def batch(self, indices):
        images = torch.from_numpy(indices % 251).to(torch.uint8).view(-1, 1, 1, 1)
        self.alive += len(images)
        self.most = max(self.most, self.alive)
        weakref.finalize(images, self.drop, len(images))
        return images

    def drop(self, count):
        self.alive -= count


def test_50000_images_are_never_in_memory_at_once():
    images = Many()
    found = extract(images, module_extractor(Means()), batch=64)
    assert images.most == 64
    assert torch.equal(found.features[:, 0], torch.arange(50_000) % 251)


def test_cache_key_depends_on_pixels_and_network(tmp_path):
    data, other = small_digits(), small_digits()
    other.images = other.images.copy()
    other.images[3, 0, 5, 5] ^= 1
    torch.manual_seed(0)
    nets = [module_extractor(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))) for _ in range(2)]
    paths = {
        cache_path(DatasetImages(d, n), net, tmp_path)
        for d in (data, other)
        for n in (None, 20)
        for net in nets
    }
    assert len(paths) == 8
    G = dcgan.Generator(5, (16, 16), 1, width=2)
    assert cache_path(GeneratedImages(G, 10), nets[0], tmp_path) is None
    assert cache_path(DatasetImages(data), module_extractor(lambda x: x), tmp_path) is None


def test_cache_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from gankern.metrics import features

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        extract(DatasetImages(small_digits()), module_extractor(Counting()), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_generated_images_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    G = dcgan.Generator(5, (16, 16), 1, width=2, c_dim=10).eval()
    labels = torch.tensor([3, 3, 7])
    images = GeneratedImages(G, 50, labels, first=4)
    assert set(images.labels.tolist()) == {3, 7}
    net = module_extractor(Counting())
    a, b = (extract(images, net, batch=batch).features for batch in (1, 16))
    torch.testing.assert_close(a, b)


def test_folder_of_images(tmp_path):
    from PIL import Image

    data = small_digits(20)
    for i, image in enumerate(data.images):
        Image.fromarray(image[0]).save(tmp_path / f"{i:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    net = module_extractor(Counting())
    folder = extract(FolderImages(tmp_path, data), net)
    assert torch.equal(folder.features, extract(DatasetImages(data), net).features)
    assert FolderImages(tmp_path, data).labels is None
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = tmp_path / "classes" / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{i:02}.png")
    labelled = FolderImages(tmp_path / "classes", data)
    assert labelled.labels.tolist() == sorted(data.labels.tolist())
    (tmp_path / "classes" / "other").mkdir()
    Image.fromarray(data.images[0, 0]).save(tmp_path / "classes" / "other" / "0.png")
    assert FolderImages(tmp_path / "classes", data).labels is None
    shutil.rmtree(tmp_path / "classes")
    (tmp_path / "99.png").write_bytes(b"broken")
    with pytest.raises(MetricsError, match=r"99.png: not an image"):
        extract(FolderImages(tmp_path, data), net)


def test_features_of_a_wrong_shape():
    with pytest.raises(MetricsError, match=r"features must be \[3, D\], got \[3, 3, 2, 2\]"):
        module_extractor(nn.Identity())(torch.zeros(3, 3, 2, 2))


def share(out):
    rank, net = dist.get_rank(), module_extractor(Counting())
    found = extract(DatasetImages(small_digits(61)), net, batch=8)
    assert Counting.seen == (31, 30)[rank], Counting.seen
    own = FeatureStatistics(16)
    own.append(found.features[rank::2])
    own.reduce()
    assert own.n == 61
    if rank == 0:
        torch.save([found.features, own.covariance], out)


def test_processes_share_the_work(tmp_path):
    out = tmp_path / "features.pt"
    processes.run(2, share, out)
    features, covariance = torch.load(out, weights_only=True)
    alone = extract(DatasetImages(small_digits(61)), module_extractor(Counting()))
    assert torch.equal(features, alone.features)
    torch.testing.assert_close(covariance, feature_statistics(alone.features).covariance)
