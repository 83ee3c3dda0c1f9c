"""The boards: good ones and broken ones. `expected` is what a person who knows the report would be told."""

from __future__ import annotations

from .sysroots import (
    DMC,
    GOOD,
    NO_DEVFREQ,
    NO_DRIVER,
    NPU,
    Board,
    Link,
    Mode,
    clocks,
    driver,
    drm,
    elf,
    functions_of,
    kernel,
    process,
)

LLM = "https://github.com/airockchip/rknn-llm/issues"
_GB = 262144  # pages

BOARDS: dict[str, Board] = {
    "armbian-vendor": Board("https://github.com/armbian/linux-rockchip/issues/266"),
    "orange-pi-0.9.8": Board(
        "https://github.com/orangepi-xunlong/linux-orangepi/issues/92",
        {
            "proc/device-tree/compatible": "xunlong,orangepi-5-plus\0rockchip,rk3588\0",
            **kernel("6.1.43-rockchip-rk3588"),
        },
    ),
    "rk3576": Board(
        "https://github.com/airockchip/rknn-llm/blob/release-v1.2.3/scripts/fix_freq_rk3576.sh",
        {
            "proc/device-tree/compatible": "friendlyelec,nanopi-r76s\0rockchip,rk3576\0",
            "proc/device-tree/npu@fdab0000/status": None,
            "proc/device-tree/npu@27700000/status": "okay\0",
            "proc/device-tree/iommu@fdab9000/status": None,
            **dict.fromkeys(path for path in GOOD if "fdab0000.npu" in path or "card1" in path or "renderD129" in path),
            **drm("card1", "27700000.npu", "RKNPU"),
            "sys/bus/platform/devices/27700000.npu": Link("/sys/devices/platform/27700000.npu"),
            "sys/devices/platform/27700000.npu/driver": Link("/sys/bus/platform/drivers/RKNPU"),
            "sys/devices/platform/27700000.npu/iommu_group": Link("/sys/kernel/iommu_groups/0"),
            **clocks("27700000.npu", "performance", 10**9, 10**9, "300000000 1000000000", "userspace performance"),
            "var/log/dmesg": "[drm] Initialized rknpu 0.9.8 20240828 for 27700000.npu on minor 1\n",
        },
    ),
    "ubuntu-rockchip-24.04": Board(
        "https://github.com/Joshua-Riek/linux-rockchip/pull/36",
        {**driver("0.9.7"), **kernel("6.1.0-1025-rockchip")},
        expected={"driver-version": "note"},
    ),
    "radxa-6.1.43": Board(
        "https://github.com/radxa-build/rock-5b/issues/29",
        {**driver("0.9.6"), **kernel("6.1.43-20-rk2312")},
        expected={"driver-version": "warning"},
    ),
    "liontron-0.9.3": Board(
        "https://github.com/yifengyou/Liontron-D3588/issues/5", driver("0.9.3"), expected={"driver-version": "warning"}
    ),
    "nanopc-t6-debian-11": Board(
        "https://github.com/Pelochus/ezrknn-llm/issues/19",
        {
            **driver("0.8.2"),
            **kernel("5.10.110"),
            "usr/lib/librkllmrt.so": elf("1.1.2", functions=functions_of("1.1.0")),
        },
        {"python": "3.9.2", "libc": "glibc 2.31"},
        expected={"driver-version": "failure", "python": "warning"},
    ),
    "orange-pi-cm4-6.6": Board(
        "https://github.com/orangepi-xunlong/orangepi-build/issues/306",
        {
            **NO_DRIVER,
            **NO_DEVFREQ,
            **kernel("6.6.0-rc5-rockchip-rk356x", "# CONFIG_DRM_ACCEL_ROCKET is not set\n"),
            "proc/device-tree/compatible": "rockchip,rk3566-orangepi-cm4\0rockchip,rk3566\0",
            "proc/device-tree/npu@fdab0000/status": None,
            "proc/device-tree/iommu@fdab9000/status": None,
            "sys/bus/platform/devices/fdab0000.npu": None,
        },
        expected={
            "soc": "failure",
            "device-tree": "unknown",
            "kernel": "note",
            "npu-driver": "failure",
            "driver-version": "unknown",
            "kernel-options": "warning",
            "npu-nodes": "unknown",
        },
    ),
    "armbian-edge-rocket": Board(
        "https://github.com/NotPunchnox/rkllama/issues/97",
        {
            **NO_DRIVER,
            **NO_DEVFREQ,
            **kernel("6.18.2-edge-rockchip64", "CONFIG_DRM_ACCEL_ROCKET=m\n"),
            "sys/module/rocket/refcnt": "0\n",
            "sys/bus/platform/drivers/rocket/bind": "",
            f"{NPU}/driver": Link("/sys/bus/platform/drivers/rocket"),
            "sys/class/accel/accel0/device": Link(f"/{NPU}"),
            "dev/accel/accel0": Mode(0o660),
        },
        expected={"kernel": "note", "npu-driver": "failure", "kernel-options": "warning"},
    ),
    "orange-pi-3b-dkms": Board(
        "https://github.com/w568w/rknpu-module",
        {
            **NO_DEVFREQ,
            **kernel("6.19.3-edge-rockchip64", "", "updates/dkms/rknpu.ko.xz:\n"),
            "boot/config-6.1.115-vendor-rk35xx": None,
            "proc/device-tree/compatible": "xunlong,orangepi-3b\0rockchip,rk3566\0",
            "sys/kernel/debug/rknpu/reset": None,
            f"{NPU}/iommu_group": None,
            "var/log/dmesg": "RKNPU fde40000.npu: RKNPU: rknpu iommu device-tree entry not found!,"
            " using non-iommu mode\n"
            "[drm] Initialized rknpu 0.9.8 for fde40000.npu on minor 1\n",
        },
        expected={
            "soc": "failure",
            "kernel": "note",
            "driver-build": "warning",
            "kernel-log": "warning",
            "iommu": "failure",
            "memory-above-4gb": "warning",
            "npu-clock": "note",
        },
    ),
    "orange-pi-5-pro-mainline": Board(
        "https://github.com/antonioacg/rknpu-rk3588/blob/main/docs/porting-journal.md",
        {
            **dict.fromkeys(path for path in GOOD if path.startswith("sys/class/devfreq/dmc/")),
            **kernel("6.18.22-current-rockchip64", "", "updates/dkms/rknpu.ko:\n"),
            **clocks("fdab0000.npu", "simple_ondemand", 200000000, 1000000000, "300000000 1000000000", "performance"),
        },
        expected={
            "kernel": "note",
            "driver-build": "warning",
            "memory-above-4gb": "warning",
            "npu-clock": "warning",
            "ddr-scaling": "note",
        },
    ),
    "npu-disabled-in-device-tree": Board(
        "https://blog.csdn.net/gitblog_00559/article/details/151477631",
        {**NO_DRIVER, "proc/device-tree/npu@fdab0000/status": "disabled\0"},
        expected={
            "device-tree": "failure",
            "npu-driver": "failure",
            "driver-version": "unknown",
            "npu-nodes": "failure",
        },
    ),
    "module-not-loaded": Board(
        "https://github.com/armbian/linux-rockchip/issues/266",
        {
            **NO_DRIVER,
            **kernel("6.1.115-vendor-rk35xx", "CONFIG_ROCKCHIP_RKNPU=m\n", "kernel/drivers/rknpu/rknpu.ko:\n"),
        },
        expected={
            "npu-driver": "failure",
            "driver-module": "failure",
            "driver-version": "unknown",
            "npu-nodes": "failure",
        },
    ),
    "render-group-only": Board(
        "https://github.com/rockchip-linux/rknn-toolkit2/issues/244",
        me={"groups": [105, 1000]},
        closed=["dev/dri/card1"],
        expected={"npu-nodes": "warning", "groups": "note"},
    ),
    "no-group": Board(
        "https://github.com/bigtreetech/CB2/issues/140",
        me={"groups": [1000]},
        closed=["dev/dri/card1", "dev/dri/renderD129", "dev/dma_heap/system", "run/rkedge/rkedge.sock"],
        expected={"npu-nodes": "failure", "groups": "note", "dma-heaps": "note", "daemon-socket": "note"},
    ),
    "nodes-for-root-alone": Board(
        "https://github.com/RadxaDocs/radxa-docs/issues/881",
        {"dev/dri/card1": Mode(0o600), "dev/dri/renderD129": Mode(0o600), "etc/udev/rules.d/60-rkedge.rules": None},
        closed=["dev/dri/card1", "dev/dri/renderD129"],
        expected={"npu-nodes": "failure", "node-modes": "warning", "udev-rule": "note"},
    ),
    "nodes-for-everybody": Board(
        "https://github.com/schwankner/talos-rk3588-npu",
        {"dev/dri/card1": Mode(0o666), "dev/dri/renderD129": Mode(0o666)},
        expected={"node-modes": "note"},
    ),
    "wrong-rknpu-link": Board(
        "https://github.com/invisiofficial/rk-llama.cpp/issues/19",
        {"dev/rknpu": Link("dri/card1")},
        expected={"rknpu-link": "failure"},
    ),
    "rknpu-link-to-nothing": Board(
        "https://github.com/invisiofficial/rk-llama.cpp/issues/19",
        {"dev/rknpu": Link("dri/card9")},
        expected={"rknpu-link": "failure"},
    ),
    "container-without-device-tree": Board(
        "https://github.com/airockchip/rknn-toolkit2/issues/33",
        {
            ".dockerenv": "",
            **dict.fromkeys(path for path in GOOD if path.startswith("proc/device-tree/")),
            "run/systemd/system/x": None,
            "proc/1/comm": "python3\n",
        },
        expected={"soc": "unknown", "device-tree": "unknown", "container-tree": "failure", "systemd": "note"},
    ),
    "container-with-render-node-only": Board(
        "https://github.com/invisiofficial/rk-llama.cpp/issues/19",
        {
            "proc/1/cgroup": "0::/docker/0123456789ab\n",
            "dev/dri/card1": None,
            "sys/fs/cgroup/memory.max": "4000000000\n",
        },
        expected={"npu-nodes": "warning", "container-nodes": "failure", "memory-limit": "note"},
    ),
    "no-iommu": Board(
        "https://github.com/rockchip-linux/rknn-toolkit2/issues/44",
        {
            "proc/device-tree/compatible": "forlinx,ok3568\0rockchip,rk3568\0",
            "var/log/dmesg": "RKNPU fde40000.npu: RKNPU: rknpu iommu is disabled, using non-iommu mode\n",
        },
        expected={"soc": "failure", "kernel-log": "warning", "iommu": "failure"},
    ),
    "iommu-unknown": Board(
        "https://github.com/rockchip-linux/rknn-toolkit2/issues/218",
        {f"{NPU}/iommu_group": None, "var/log/dmesg": None},
        expected={"iommu": "unknown"},
    ),
    "uefi-without-dmc": Board(
        "https://github.com/edk2-porting/edk2-rk3588/issues/205",
        {
            **dict.fromkeys(path for path in GOOD if path.startswith("sys/class/devfreq/dmc/")),
            "var/log/dmesg": "[   22.89] rockchip-dmc dmc: current ATF version 0x0\n",
        },
        expected={"ddr-scaling": "warning"},
    ),
    "memory-clock-rises-too-late": Board(
        "https://github.com/ThomasKaiser/Knowledge/issues/7",
        {
            **clocks("dmc", "dmc_ondemand", 528000000, 2112000000, DMC, "dmc_ondemand userspace performance"),
            "sys/class/devfreq/dmc/upthreshold": "40\n",
        },
        expected={"ddr-clock": "note", "ddr-upthreshold": "warning"},
    ),
    "memory-clock-unreadable": Board(
        f"{LLM}/150",
        {"sys/class/devfreq/dmc/available_frequencies": None, "sys/class/devfreq/fdab0000.npu/cur_freq": "\n"},
        expected={"ddr-clock": "unknown", "npu-clock": "unknown"},
    ),
    "memory-clock-capped": Board(
        f"{LLM}/532",
        {
            **clocks("dmc", "powersave", 528000000, 528000000, DMC, "powersave performance"),
            "sys/class/devfreq/dmc/upthreshold": None,
        },
        expected={"ddr-clock": "warning"},
    ),
    "slow-clocks": Board(
        f"{LLM}/29",
        {
            "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "ondemand\n",
            "sys/devices/system/cpu/cpufreq/policy6/scaling_max_freq": "1200000\n",
            "sys/devices/system/cpu/cpu5/cpuidle/state1/disable": "0\n",
            **clocks("fdab0000.npu", "rknpu_ondemand", 300000000, 1000000000, "300000000 1000000000", "performance"),
        },
        expected={"cpu-governor": "note", "cpu-limit": "warning", "cpu-idle": "note", "npu-clock": "warning"},
    ),
    "hot": Board(
        "https://github.com/ThomasKaiser/Knowledge/tree/master/articles",
        {
            "sys/class/thermal/thermal_zone0/temp": "88000\n",
            "sys/class/thermal/cooling_device0/cur_state": "3\n",
        },
        expected={"temperature": "warning", "throttling": "warning"},
    ),
    "warm": Board(
        "https://github.com/ThomasKaiser/Knowledge/tree/master/articles",
        {"sys/class/thermal/thermal_zone0/temp": "79500\n"},
        expected={"temperature": "note"},
    ),
    "few-open-files": Board(f"{LLM}/17", me={"open_files": [1024, 4096]}, expected={"open-files": "note"}),
    "shared-npu": Board(
        f"{LLM}/437",
        {
            **process(901, "frigate.detecto", 2 * _GB // 4, "/dev/dri/card1", "/dev/null"),
            **process(902, "python3", 2 * _GB, "/dev/dri/renderD129"),
        },
        expected={"npu-users": "note", "memory-holders": "note"},
    ),
    "old-library-first": Board(
        f"{LLM}/389",
        {
            "usr/lib/librkllmrt.so": elf("1.2.0", functions=functions_of("1.2.0")),
            "usr/local/lib/librkllmrt.so": elf("1.2.3"),
        },
        expected={"library-twice": "warning"},
    ),
    "library-1.0.1": Board(
        f"{LLM}/62",
        {**driver("0.8.2"), "usr/lib/librkllmrt.so": elf("1.0.1", functions=functions_of("1.0.1"))},
        expected={"library-release": "failure"},
    ),
    "library-without-libgomp": Board(
        "https://github.com/Luna-Inference/open-rkllm",
        {"usr/lib/aarch64-linux-gnu/libgomp.so.1": None},
        expected={"library-needs": "failure"},
    ),
    "library-elsewhere": Board(
        f"{LLM}/59",
        {
            "usr/lib/librkllmrt.so": None,
            "opt/rkllm/librkllmrt.so": elf(),
            "etc/rkedge/daemon.yaml": "library: /opt/rkllm/librkllmrt.so\n",
        },
        expected={"library-on-path": "note"},
    ),
    "no-library": Board(
        "https://github.com/NotPunchnox/rkllama/issues/22",
        {"usr/lib/librkllmrt.so": None},
        expected={"library-found": "warning"},
    ),
    "library-cut": Board(f"{LLM}/175", {"usr/lib/librkllmrt.so": elf()[:90]}, expected={"library-release": "failure"}),
    "library-with-more": Board(
        "https://github.com/Luna-Inference/open-rkllm",
        {"usr/lib/librkllmrt.so": elf("1.1.4", functions=functions_of("1.2.3"))},
        expected={"library-release": "note"},
    ),
    "ubuntu-18.04": Board(
        "https://github.com/Luna-Inference/open-rkllm",
        me={"libc": "glibc 2.27", "python": "3.6.9"},
        expected={"library-libc": "failure", "python": "warning"},
    ),
    "a-pc": Board(
        "https://github.com/cqu20160901/yolov8_rknn_Cplusplus/issues/8",
        dict.fromkeys(path for path in GOOD if path.startswith(("proc/device-tree/", "dev/"))),
        {"machine": "x86_64", "cpus": [0, 1]},
        expected={"architecture": "failure"},
    ),
    "32-bit-system": Board(
        f"{LLM}/366",
        {"usr/lib/librkllmrt.so": elf(machine=40, bits=32)},
        {"bits": 32, "venv": False},
        expected={
            "python-bits": "failure",
            "library-release": "failure",
            "library-machine": "failure",
            "python-venv": "note",
        },
    ),
    "two-cores-left": Board(
        "https://github.com/kamyarkazremi/orangepi5-rkllm", me={"cpus": [0, 1]}, expected={"cpu-cores": "failure"}
    ),
    "two-cores-of-an-rk3562": Board(
        "https://github.com/airockchip/rknn-llm/blob/release-v1.2.3/scripts/fix_freq_rk3562.sh",
        {"proc/device-tree/compatible": "rockchip,rk3562-evb\0rockchip,rk3562\0"},
        {"cpus": [0, 1]},
    ),
    "big-cores-off": Board(
        "https://github.com/kamyarkazremi/orangepi5-rkllm",
        {"sys/devices/system/cpu/online": "0-5\n"},
        expected={"cpu-cores": "warning"},
    ),
    "rock-5c-lite": Board(
        "https://docs.radxa.com/en/rock5/rock5c",
        {"proc/device-tree/compatible": "radxa,rock-5c-lite\0rockchip,rk3582\0rockchip,rk3588s\0"},
        expected={"soc-cores": "note"},
    ),
    "sd-card-without-clock": Board(
        "https://github.com/MichaIng/DietPi/issues/7254",
        {
            "proc/mounts": "/dev/mmcblk1p2 / ext4 rw 0 0\n",
            "sys/block/mmcblk1/queue/read_ahead_kb": "128\n",
            "sys/block/nvme0n1/queue/read_ahead_kb": "128\n",
            "run/systemd/timesync/synchronized": None,
            "run/systemd/timesync/x": "",
        },
        {"time": 1.6e9},
        expected={"disk-kind": "note", "read-ahead": "note", "time-right": "warning", "time-synchronized": "note"},
    ),
    "full-disk": Board(
        f"{LLM}/175",
        document={"disks": {"/": {"free": 10**8, "size": 8 * 10**9}}},
        expected={"disk-space": "warning"},
    ),
    "job-timeout": Board(
        f"{LLM}/85",
        {"var/log/dmesg": "[  99.1] RKNPU: job timeout, irq status: 0x0, raw status: 0x0\n"},
        expected={"kernel-log": "warning"},
    ),
    "a-log-about-something-else": Board(
        "https://docs.kernel.org/input/input.html",
        {"var/log/dmesg": "[ 3.1] input: failed to register; usb 1-1 iommu: using iommu mode, job timeout of a disk\n"},
    ),
    "rocket-owns-it-though-rknpu-is-there": Board(
        "https://github.com/w568w/rknpu-module",
        {
            **NO_DRIVER,
            **NO_DEVFREQ,
            **kernel("6.18.2-edge-rockchip64", "", "updates/dkms/rknpu.ko:\n"),
            "sys/bus/platform/drivers/RKNPU/bind": "",
            "sys/bus/platform/drivers/rocket/bind": "",
            f"{NPU}/driver": Link("/sys/bus/platform/drivers/rocket"),
            "sys/module/rocket/refcnt": "0\n",
            "sys/module/rknpu/version": "0.9.8\n",
        },
        expected={"kernel": "note", "npu-driver": "failure", "driver-build": "warning", "npu-nodes": "failure"},
    ),
    "new-module-not-loaded": Board(
        "https://github.com/Joshua-Riek/ubuntu-rockchip/issues/1093",
        {"sys/kernel/debug/rknpu/version": "RKNPU driver: v0.9.7\n"},
        expected={"driver-versions-agree": "warning"},
    ),
    "resets-off": Board(
        "https://github.com/rockchip-linux/kernel/tree/develop-6.1/drivers/rknpu",
        {"sys/kernel/debug/rknpu/reset": "off\n", "sys/module/rknpu/parameters/bypass_soft_reset": "1\n"},
        expected={"driver-parameters": "warning", "driver-reset": "warning"},
    ),
    "little-memory": Board(
        "https://github.com/Pelochus/ezrknn-llm/issues/13",
        {"proc/meminfo": "MemTotal:  4000000 kB\nMemAvailable:   400000 kB\n"},
        expected={"memory-free": "warning"},
    ),
    "daemon-failed": Board(
        "https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html",
        {
            "sys/fs/cgroup/system.slice/rkedge.service/cgroup.procs": "",
            "run/rkedge/rkedge.sock": None,
        },
        expected={"daemon-running": "warning"},
    ),
    "model-failed": Board(
        "https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html",
        document={"files": {"run/rkedge/rkedge.sock": {"text": '{"state": "failed", "error": "no \\u001b[2Jmemory"}'}}},
        expected={"daemon-model": "failure"},
    ),
    "daemon-says-nothing": Board(
        "https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html",
        document={"files": {"run/rkedge/rkedge.sock": {"text": "[]"}}},
        expected={"daemon-model": "unknown"},
    ),
    "no-daemon": Board(
        "https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html",
        {"etc/systemd/system/rkedge.service": None, "run/rkedge/rkedge.sock": None},
        expected={"daemon-unit": "note"},
    ),
    "only-root-knows": Board(
        "https://github.com/airockchip/rknn-toolkit2/issues/68",
        {"sys/module/rknpu/version": None, "sys/kernel/debug/rknpu/version": None, "var/log/dmesg": None},
        document={
            "files": {"sys/kernel/debug/rknpu/version": {"error": "EACCES"}, "dev/kmsg": {"error": "EPERM"}},
            "hidden_processes": 7,
        },
        expected={"driver-version": "unknown", "kernel-log": "unknown", "npu-users": "unknown", "more-as-root": "note"},
    ),
    "probe-hangs": Board(
        f"{LLM}/289",
        document={"problems": ["/sys/kernel/debug/rknpu/load did not answer in 20 seconds"]},
        expected={"seen": "warning"},
    ),
    "nothing-at-all": Board(
        "https://docs.kernel.org/filesystems/sysfs.html",
        dict.fromkeys(GOOD),
        expected={
            "soc": "unknown",
            "device-tree": "unknown",
            "kernel": "unknown",
            "npu-driver": "unknown",
            "driver-version": "unknown",
            "npu-nodes": "unknown",
            "memory-free": "unknown",
            "library-found": "warning",
            "image": "unknown",
            "systemd": "note",
        },
    ),
    "no-clock-control": Board(
        "https://github.com/w568w/rknpu-module",
        dict.fromkeys(path for path in GOOD if "cpufreq/" in path),
        expected={"cpu-governor": "unknown"},
    ),
    # Bundles.
    "bundle": Board("https://github.com/airockchip/rknn-llm/tree/main/doc", model={}),
    "bundle-for-another-board": Board(
        f"{LLM}/186",
        model={"platform": "rk3576", "dtype": "w4a16"},
        expected={"bundle-platform": "failure"},
    ),
    "bundle-of-a-type-that-is-not-offered": Board(
        f"{LLM}/186", model={"dtype": "w4a16"}, expected={"bundle-type": "failure"}
    ),
    "bundle-of-a-newer-toolkit": Board(
        "https://github.com/kuneberg/rk_llm_chat", model={"toolkit": "1.3.0"}, expected={"bundle-releases": "failure"}
    ),
    "bundle-too-large": Board(
        "https://github.com/c0zaut/ez-er-rkllm-toolkit/issues/2",
        model={"size": 40 * 10**9},
        document={"disks": {"/": {"free": 10**10, "size": 10**11}}},
        expected={"bundle-memory": "failure", "bundle-disk": "warning"},
    ),
    "bundle-with-more-cores": Board(
        "https://github.com/kamyarkazremi/orangepi5-rkllm", model={"npu_cores": 9}, expected={"bundle-cores": "failure"}
    ),
}
