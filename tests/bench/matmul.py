"""This machine's own best rate of matrix products, in bf16 and fp32: what every MFU on a CPU is quoted against.

    python tests/bench/matmul.py

Products of the shapes that training has, and a few that suit the machine better; forward only, in turn, the best of
them counts. A product of [n, k] and [k, m] is 2 n k m operations. Prints a table and one line of JSON.
"""
import json, statistics, time

import torch

SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1408, 512), (4096, 512, 2816), (4096, 2048, 512),
          (4096, 512, 2048), (1024, 512, 32_000)]


def seconds(a, b, least=0.2):
    """Median seconds of a product, over at least `least` seconds."""
    times = []
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def best(dtype, rounds=3):
    """-> (operations a second of the best shape, that shape)"""
    rates = {}
    with torch.inference_mode():
        for _ in range(rounds):
            for n, k, m in SHAPES:
                a, b = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
                seconds(a, b, 0.05)                                    # a kernel is prepared for a shape that is new
                rates.setdefault((n, k, m), []).append(2 * n * k * m / seconds(a, b))
    medians = {shape: statistics.median(r) for shape, r in rates.items()}
    top = max(medians, key=medians.get)
    return medians[top], top, (min(rates[top]), max(rates[top]))


def main():
    result = {"threads": torch.get_num_threads()}
    for dtype in (torch.bfloat16, torch.float32):
        rate, shape, (least, most) = best(dtype)
        name = str(dtype).removeprefix("torch.")
        result[name] = round(rate / 1e9)
        print(f"{name:<9} {rate / 1e9:8.0f} GFLOP/s ({least / 1e9:.0f} to {most / 1e9:.0f})   "
              f"at {' x '.join(map(str, shape))}   {torch.get_num_threads()} threads")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
