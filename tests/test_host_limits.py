"""Cores and memory are the container's, not the host's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trivium.host_limits import MemoryLimit, cpu_limit, memory_limit

MIB = 2**20
GIB = 2**30
UNLIMITED_V1 = str(2**63 - 4096)

V2 = "30 24 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw"
V2_BESIDE_V1 = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def v1(controllers: str, top: str = "/") -> str:
    """A line of /proc/self/mountinfo."""
    point = f"/sys/fs/cgroup/{controllers}"
    return f"35 31 0:32 {top} {point} rw,relatime shared:9 - cgroup none rw,{controllers}"


class Host:
    """The files of a host with 64 cores of two threads each and 256 GiB, 200 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {256 * MIB} kB\nMemAvailable: {200 * MIB} kB")
        for cpu in range(128):
            siblings = f"{cpu % 64},{cpu % 64 + 64}"
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def mount(self, *lines: str) -> None:
        self.write(
            "proc/self/mountinfo", "\n".join(("22 27 0:21 / /proc rw - proc proc rw", *lines))
        )

    def groups(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def limit(self, group: str, **files: str) -> None:
        """Writes files of a group; `cpu__max` is cpu.max."""
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{group}/{name.replace('__', '.')}", text)

    def cores(self, cpus: range = range(128)) -> int:
        return cpu_limit(self.root, cpus).cores

    def memory(self) -> MemoryLimit:
        return memory_limit(self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("cpus", "cores"),
    [
        (range(128), 64),
        (range(4), 4),
        (range(0, 65, 64), 1),  # two threads of one core
        (range(127, 128), 1),
    ],
)
def test_hyperthreads_count_as_one_core(host: Host, cpus: range, cores: int) -> None:
    """The affinity mask lists logical CPUs; those of one core share its arithmetic units."""
    assert cores == host.cores(cpus)


def test_without_a_topology_each_cpu_is_a_core(tmp_path: Path) -> None:
    """There is no topology on macOS, or in sandboxes without /sys."""
    assert 5 == cpu_limit(tmp_path, range(5)).cores


def test_a_host_without_cgroups(host: Host) -> None:
    """The limit has the available memory, and says that it is this host's."""
    assert MemoryLimit(256 * GIB, 200 * GIB, "this host") == host.memory()


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)],
)
def test_the_quota_of_a_container_under_version_2(host: Host, quota: str, cores: int) -> None:
    """Quotas are rounded down, as threads that exceed them are throttled, but to at least one."""
    host.mount(V2)
    host.groups("0::/")
    host.limit(".", cpu__max=quota)

    assert cores == host.cores()


@pytest.mark.parametrize(
    ("quota", "cores"), [("-1", 64), ("400000", 4), ("250000", 2), ("50000", 1)]
)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_a_container_under_version_1(
    host: Host, controllers: str, quota: str, cores: int
) -> None:
    """Docker mounts the container's own group, while /proc shows its path on the host."""
    host.mount(v1(controllers, "/docker/abc"))
    host.groups(f"3:{controllers}:/docker/abc", "0::/docker/abc")
    host.limit(controllers, cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")

    assert cores == host.cores()


def test_the_quota_names_its_source(host: Host) -> None:
    """An operator thereby knows what to change."""
    host.mount(V2)
    host.groups("0::/kubepods/pod1")
    host.limit("kubepods/pod1", cpu__max="350000 100000")

    limit = cpu_limit(host.root, range(128))

    assert str(limit).startswith("3 cores (quota of 3.5 CPUs in ")
    assert "/sys/fs/cgroup/kubepods/pod1" in str(limit)


def test_a_quota_above_the_affinity_mask_is_ignored(host: Host) -> None:
    """Four CPUs' time is of no use with two cores."""
    host.mount(V2)
    host.groups("0::/")
    host.limit(".", cpu__max="400000 100000")

    assert 2 == host.cores(range(2))


@pytest.mark.parametrize(
    "group", ["kubepods/pod1/container", "kubepods/pod1", "kubepods", "."], ids=str
)
def test_the_lowest_limit_of_all_ancestors_applies(host: Host, group: str) -> None:
    """A pod's limit applies to its containers, and a slice's to its pods."""
    host.mount(V2)
    host.groups("0::/kubepods/pod1/container")
    host.limit("kubepods/pod1/container", memory__max=str(8 * GIB), memory__current="0")
    host.limit("kubepods/pod1/container", cpu__max="800000 100000")
    host.limit(group, memory__max=str(2 * GIB), memory__current=str(GIB), cpu__max="200000 100000")

    memory = host.memory()
    assert (2 * GIB, GIB) == (memory.total, memory.free)
    assert memory.source.rstrip("/").endswith(f"/sys/fs/cgroup/{group}".rstrip("/."))
    assert 2 == host.cores()


def test_the_group_with_the_least_memory_left_applies(host: Host) -> None:
    """A higher limit that others have used up may leave less than a lower one."""
    host.mount(V2)
    host.groups("0::/pod/container")
    host.limit("pod/container", memory__max=str(2 * GIB), memory__current="0")
    host.limit("pod", memory__max=str(8 * GIB), memory__current=str(7 * GIB))

    assert (8 * GIB, GIB) == (host.memory().total, host.memory().free)


def test_memory_high_is_a_limit(host: Host) -> None:
    """Above memory.high the kernel slows the group down until it is useless."""
    host.mount(V2)
    host.groups("0::/")
    host.limit(".", memory__max=str(4 * GIB), memory__high=str(3 * GIB), memory__current=str(GIB))

    assert (3 * GIB, 2 * GIB) == (host.memory().total, host.memory().free)


def test_no_limit_under_version_2(host: Host) -> None:
    """An absent limit is written as `max`."""
    host.mount(V2)
    host.groups("0::/")
    host.limit(".", memory__max="max", memory__high="max", memory__current=str(300 * GIB))

    assert "this host" == host.memory().source


def test_the_page_cache_counts_as_available(host: Host) -> None:
    """The kernel drops file pages when memory is short, but not shared memory."""
    host.mount(V2)
    host.groups("0::/")
    statistics = f"anon {MIB}\nfile {900 * MIB}\nshmem 0\ninactive_file {500 * MIB}\n"
    host.limit(".", memory__max=str(GIB), memory__current=str(1000 * MIB))
    host.limit(".", memory__stat=f"{statistics}active_file {400 * MIB}")

    assert 924 * MIB == host.memory().free


def test_a_limit_below_the_usage_leaves_nothing(host: Host) -> None:
    """What is left is zero, not negative."""
    host.mount(V2)
    host.groups("0::/")
    host.limit(".", memory__max=str(GIB), memory__current=str(2 * GIB))

    assert 0 == host.memory().free


@pytest.mark.parametrize(
    ("group", "top"), [("/docker/abc", "/docker/abc"), ("/docker/abc", "/"), ("/", "/")]
)
def test_memory_under_version_1(host: Host, group: str, top: str) -> None:
    """This works in a container or beside one; `total_` includes child groups."""
    folder = "memory" if group == top else f"memory{group}"
    host.mount(v1("cpu", top), v1("memory", top), V2_BESIDE_V1)
    host.groups(f"4:memory:{group}", f"1:cpu:{group}", "0::/")
    host.limit("memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes=str(3 * GIB))
    host.limit(folder, memory__limit_in_bytes=str(GIB), memory__usage_in_bytes=str(600 * MIB))
    statistics = f"inactive_file 0\ntotal_inactive_file {50 * MIB}\ntotal_active_file {50 * MIB}"
    host.limit(folder, memory__stat=statistics)

    assert (GIB, 524 * MIB) == (host.memory().total, host.memory().free)


def test_a_limit_above_the_mounted_group_under_version_1(host: Host) -> None:
    """A container cannot see its pod's group, but has this number."""
    host.mount(v1("memory", "/kubepods/pod1/container"))
    host.groups("4:memory:/kubepods/pod1/container")
    host.limit("memory", memory__limit_in_bytes=UNLIMITED_V1, memory__usage_in_bytes="0")
    host.limit("memory", memory__stat=f"hierarchical_memory_limit {GIB}")

    assert GIB == host.memory().total


@pytest.mark.parametrize("group", ["/../../elsewhere", "/elsewhere/entirely"])
def test_a_group_that_is_not_mounted(host: Host, group: str) -> None:
    """Only what is mounted can be read."""
    host.mount(V2.replace(" / /sys", " /container /sys"))
    host.groups(f"0::{group}")
    host.limit(".", memory__max=str(GIB), memory__current="0", cpu__max="100000 100000")

    assert GIB == host.memory().total
    assert 1 == host.cores()


def test_limits_of_the_test_process() -> None:
    """The test process has at least one core, and some of its memory is in use."""
    memory = memory_limit()

    assert cpu_limit().cores >= 1
    assert MIB < memory.free < memory.total


TOKENIZER = """
import tokenizer_svc.tokenizer as door
import tokenizers
model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
door.Tokenizer(tokenizers.Tokenizer(model).to_str()).encode("a")
"""


@pytest.mark.parametrize("use", [TOKENIZER, "import generator_svc, numpy"])
def test_libraries_do_not_start_a_thread_per_host_cpu(use: str) -> None:
    """A container with one core may run on a host with dozens of CPUs."""
    count = "import os\nprint(len(os.listdir('/proc/self/task')))"
    done = subprocess.run(
        [sys.executable, "-c", use + "\n" + count],
        cwd=Path(__file__).parents[1],
        env={"PATH": os.environ["PATH"], "RAYON_NUM_THREADS": "40"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert 1 == int(done.stdout)
