"""Makes the tables and the plot of benchmarks/scale.py from results/scale.csv and results/scale-measured.csv."""

from benchmarks import plots, tables


def table(devices=(8, 1024)):
    """Return the table of results/scale.csv for these numbers of devices."""
    rows = tables.read("scale")
    if not rows:
        return tables.missing("python -m benchmarks.scale --csv benchmarks/results/scale.csv")
    methods, r = list(dict.fromkeys(row["method"] for row in rows)), rows[0]
    found = {(row["faster"], row["link"], row["devices"], row["method"]): row for row in rows}
    body = []
    for faster, link in dict.fromkeys((row["faster"], row["link"]) for row in rows):
        for count in map(str, devices):
            cells = [link, f"{float(faster):g} x", f"{int(count):,}"]
            for method in methods:
                row = found.get((faster, link, count, method))
                text = "" if row is None else f"{float(row['efficiency']):.0%}"
                if row is not None and "2-D" in method:
                    most = f"{float(row['mbytes_sent']):.0f} MB, {float(row['memory_mib']):,.0f} MiB"
                    text += f" ({row['data']} x {row['stages']}: {float(row['images_per_second']):,.0f}/s, {most})"
                cells.append(text)
            body.append(cells)
    width = f", width {r['width']}" if r["model"].startswith("resnet") else ""
    title = (
        f"{r['model']}{width}, {r['granularity']} granularity, {float(r['batch']):g} images a device, Adam, {r['all_reduce']} all-reduce. "
        f"Efficiency against one device; 2-D: replicas x stages of the fastest split, images/s, and of the devices with most the MB sent a step "
        f"and the MiB of memory. Computing 1 x as fast as one core of the machine below, the other speeds are assumed:\n\n"
    )
    return title + tables.table(("link", "computing", "devices", *methods), body) + tables.measured_on(r)


def measured():
    """Return the tables of results/scale-measured.csv, one for each batch size."""
    from benchmarks.scale import label

    rows = tables.read("scale-measured")
    if not rows:
        return tables.missing("python -m benchmarks.scale --measure --csv benchmarks/results/scale-measured.csv")
    percent = lambda text, digits=0: f"{float(text):+.{digits}%}" if text else ""  # noqa: E731
    number = lambda text, digits=1: f"{float(text):.{digits}f}" if text else ""  # noqa: E731
    header = (
        "processes",
        "what",
        "ms a step",
        "20 to 80 %",
        "predicted",
        "off",
        "slowed",
        "off",
        "MB sent",
        "predicted",
        "off",
    )
    text = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        of_batch = [row for row in rows if row["batch"] == batch]
        body = [
            (
                r["processes"], label(r), number(r["milliseconds"]), f"{number(r['milliseconds_20'])} to {number(r['milliseconds_80'])}",
                number(r["predicted"]), percent(r["error"]), number(r["slowed"]), percent(r["slowed_error"]),
                number(r["mbytes"], 3), number(r["predicted_mbytes"], 3), percent(r["bytes_error"], 2),
            )
            for r in of_batch
        ]  # fmt: skip
        r = of_batch[0]
        title = f"{r['model']}, width {r['width']}, {r['size']} x {r['size']}, {r['classes']} classes, {batch} images a process:\n\n"
        text.append(title + tables.table(header, body))
    return "\n\n".join(text) + tables.measured_on(rows[0])


def plot(folder):
    """Draw the efficiency over the number of devices into FOLDER/scale.png, with a panel for each link and speed (except that of one core)."""
    rows = [row for row in tables.read("scale") if float(row["faster"]) != 1]
    if not rows:
        return
    speeds, links = (list(dict.fromkeys(row[key] for row in rows)) for key in ("faster", "link"))
    figure, axes = plots.figure(len(speeds), len(links), (3.9, 3.5), sharex=True, sharey=True)
    styles = {"data": "-", "DDP": "-", "blocks": ":", "1F1B": ":", "2-D": "--"}
    for faster, line in zip(speeds, axes, strict=True):
        for link, axis in zip(links, line, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                points = [r for r in rows if (r["faster"], r["link"], r["method"]) == (faster, link, method)]
                kind, split = method.split(", ")
                colour = plots.COLOURS["block" if kind == "SFF" else "backprop"]
                label = method.replace("backprop", "backpropagation").replace("2-D", "best of all splits")
                x, y = ([float(r[key]) for r in points] for key in ("devices", "efficiency"))
                axis.plot(x, [100 * v for v in y], styles[split], color=colour, linewidth=2, label=label)
            axis.set_title(f"{link}\ndevices {float(faster):g} x one core (assumed)", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
            axis.set_ylim(0, 105)
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    for line in axes:
        line[0].set_ylabel("efficiency against one (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    r = rows[0]
    width = f" of width {r['width']}" if r["model"].startswith("resnet") else ""
    figure.suptitle(f"A model of scale: {r['model']}{width}, {float(r['batch']):g} images a device")
    plots.save(figure, f"{folder}/scale.png")
