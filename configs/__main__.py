"""python -m configs configs/ft.yaml lr=1e-4: every value of the merged config, and the layer it came from."""
import sys

import configs

cfg, source, explicit = configs.load_or_exit(sys.argv[1:])
rows = [(key, "null" if value is None else configs.dump(value).removesuffix("...\n").strip() if not isinstance(value, list) else str(value), source.get(key, ""))
        for key, value in configs.flat(cfg).items()]
widths = [max(len(row[i]) for row in rows) for i in (0, 2)]
for key, value, layer in rows:
    print(f"{key:<{widths[0]}}  {layer:<{widths[1]}}  {value}")
