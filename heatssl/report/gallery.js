"use strict";
const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const dialog = one("dialog");
const facts = JSON.parse(one("#facts").textContent);
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// ---- values: the page's own PNGs hold unfiltered rows of 8-bit codes

const decoded = new Map(); // by data URI: a map may be shown twice
const codesOf = (source) => {
  if (!decoded.has(source)) decoded.set(source, inflate(bytes(source.split(",")[1])));
  return decoded.get(source);
};
const inflate = async (file) => {
  const view = new DataView(file.buffer), packed = [];
  for (let at = 8; at < file.length; at += 12 + view.getUint32(at)) {
    const kind = String.fromCharCode(...file.subarray(at + 4, at + 8));
    if (kind === "IDAT") packed.push(file.subarray(at + 8, at + 8 + view.getUint32(at)));
  }
  const stream = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const codes = new Uint8Array(await new Response(stream).arrayBuffer());
  return { columns: view.getUint32(16), rows: view.getUint32(20), channels: file[25] === 2 ? 3 : 1, codes };
};

const place = (element, event, rows, columns) => {
  const box = element.getBoundingClientRect();
  const share = (at, start, length, count) => clamp(Math.floor((at - start) / length * count), 0, count - 1);
  return [share(event.clientY, box.top, box.height, rows), share(event.clientX, box.left, box.width, columns)];
};
const short = (value) => String(Number(value.toPrecision(3))).replace("-", "\u2212");
const position = (row, column, rows, columns) => `row ${row + 1}, column ${column + 1} of ${rows} × ${columns}`;

// The text for a map under the pointer: its value, or the three of a colour.
const read = async (image, event) => {
  const { columns, rows, channels, codes } = await codesOf(image.src);
  const [row, column] = place(image, event, rows, columns);
  const lows = image.dataset.low.split(" ").map(Number), highs = image.dataset.high.split(" ").map(Number);
  const values = lows.map((low, channel) => {
    const code = codes[row * (columns * channels + 1) + 1 + column * channels + channel];
    // The ends of a colour stand for all that lies beyond.
    const end = channels === 3 && (code === 0 ? "≤ " : code === 255 ? "≥ " : "");
    return (end || "") + short(low + code / 255 * (highs[channel] - low));
  });
  const block = Number(image.dataset.block);
  const mean = block > 1 ? `, mean of ${block} × ${block}` : "";
  return `${values.join(", ")} at ${position(row, column, rows, columns)}${mean}`;
};

const reading = one("#reading");
const tell = (text, event) => {
  reading.hidden = !text;
  if (!text) return;
  reading.textContent = text;
  const box = reading.getBoundingClientRect();
  reading.style.left = `${clamp(event.clientX + 14, 4, innerWidth - box.width - 4)}px`;
  reading.style.top = `${clamp(event.clientY - box.height - 12, 4, innerHeight - box.height - 4)}px`;
};
let newest = 0; // reading is asynchronous: an older answer must not overwrite a newer one
const follow = async (event) => {
  const mine = ++newest, image = event.target.closest?.(".cell")?.querySelector("img");
  const text = image ? await read(image, event) : "";
  if (mine !== newest) return;
  if (image && dialog.open) one("#value").textContent = text;
  else if (!event.target.closest?.(".match")) tell(text && `${one(".column", image.closest("td")).textContent}: ${text}`, event);
};
for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, follow);
document.addEventListener("scroll", () => tell(""), { passive: true });

// ---- which images, in which order

const find = one("#find"), order = one("#order"), reverse = one("#reverse");
const bodies = [...all(".maps tbody"), ...all(".matches")];
bodies.forEach((body) => [...body.children].forEach((row, index) => { row.dataset.index = index; }));
const arrange = () => {
  const words = find.value.toLowerCase(), turn = reverse.getAttribute("aria-pressed") === "true" ? -1 : 1;
  const score = (row) => order.value ? facts.scores[row.dataset.image]?.[order.value] : Number(row.dataset.index);
  let shown = 0;
  for (const body of bodies) {
    const rows = [...body.children];
    for (const row of rows) row.hidden = !(one("th, figcaption", row).textContent + row.dataset.image).toLowerCase().includes(words);
    shown += rows.filter((row) => !row.hidden).length;
    const missing = (row) => Number(score(row) === undefined); // without the score: last, whichever way
    rows.sort((a, b) => missing(a) - missing(b) || turn * (score(a) - score(b)) || a.dataset.index - b.dataset.index);
    body.append(...rows);
  }
  one("#none").hidden = shown > 0;
};
find.addEventListener("input", arrange);
order.addEventListener("change", arrange);
reverse.addEventListener("click", () => {
  reverse.setAttribute("aria-pressed", reverse.getAttribute("aria-pressed") !== "true");
  arrange();
});
one("#opacity").addEventListener("input", (event) => document.body.style.setProperty("--opacity", event.target.value / 100));
one("#smooth").addEventListener("change", (event) => document.body.classList.toggle("smooth", event.target.checked));
one(".tools").addEventListener("submit", (event) => event.preventDefault());
one(".tools").hidden = false;

// ---- one map large; arrow keys go through those that are shown

let open = null;
const enlarge = (cell) => {
  open = cell;
  const row = cell.closest("tr"), stage = one(".stage");
  stage.className = `stage ${[...row.classList].join(" ")}`;
  const copy = document.createElement("div");
  copy.className = cell.className;
  copy.append(...[...cell.children].map((child) => child.cloneNode()));
  stage.replaceChildren(copy);
  const note = [...cell.parentElement.querySelectorAll(":scope > small:not(.column)")].map((small) => ` · ${small.textContent}`);
  one("#caption").textContent = one("img", cell).alt + note.join("");
  one("#value").textContent = "Values are read by the pointer.";
  one("#full").href = cell.href;
  one("#full").toggleAttribute("download", cell.hasAttribute("download"));
  tell("");
  if (dialog.open) return;
  dialog.showModal();
  dialog.querySelector("[type=submit]").focus(); // not by autofocus, which also acts when the page loads
};
const neighbour = (cell, right, down) => {
  const row = cell.closest("tr"), cells = all("td", row), at = cells.indexOf(cell.closest("td"));
  let next = row;
  if (down) do next = down > 0 ? next.nextElementSibling : next.previousElementSibling; while (next?.hidden);
  const beside = next && all("td", next)[at + right];
  return beside && one("a.cell", beside);
};
// Beyond the end of a row the next one begins, so that two buttons reach every map.
const following = (cell, step) => {
  const cells = all("tr:not([hidden]) a.cell", cell.closest("tbody"));
  return cells[(cells.indexOf(cell) + step + cells.length) % cells.length];
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
for (const cell of all("a.cell")) {
  cell.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    enlarge(cell);
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
  if (event.target.value) enlarge(following(open, Number(event.target.value)));
});
dialog.addEventListener("close", () => focusOn(open));

// One stop of the tab key for each table; arrow keys move inside.
const focusOn = (cell) => {
  all("a.cell", cell.closest("table")).forEach((other) => { other.tabIndex = other === cell ? 0 : -1; });
  cell.focus();
};
all(".maps").forEach((table) => all("a.cell", table).forEach((cell, index) => { cell.tabIndex = index ? -1 : 0; }));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) {
    if (event.key === "Escape" && event.target === find) find.blur();
    return;
  }
  const arrow = ARROWS[event.key], cell = dialog.open ? open : event.target.closest("a.cell");
  if (arrow && cell) {
    const next = neighbour(cell, ...arrow);
    if (next) (dialog.open ? enlarge : focusOn)(next);
    event.preventDefault();
  } else if (dialog.open) {
    return;
  } else if (event.key === "/") {
    find.focus();
    event.preventDefault();
  } else if (event.key === "s") {
    order.selectedIndex = (order.selectedIndex + 1) % order.options.length;
    arrange();
  } else if (event.key === "r") reverse.click();
});

// ---- correspondence: cosines of one position's features with all others

const matches = all(".match");
const cosines = matches.map(() => new Float32Array()); // of each image's positions with the chosen one
if (matches.length) {
  const { rows, columns, dimensions } = one(".matches").dataset;
  const height = Number(rows), width = Number(columns), length = Number(dimensions);
  const palette = bytes(facts.palette);
  const fields = matches.map((figure) => {
    const codes = new Int8Array(bytes(figure.dataset.codes).buffer), unit = Float32Array.from(codes);
    for (let at = 0; at < unit.length; at += length) {
      const norm = Math.hypot(...unit.subarray(at, at + length)) || 1;
      for (let k = at; k < at + length; k++) unit[k] /= norm;
    }
    return unit;
  });
  let chosen = [0, Math.floor(height / 2) * width + Math.floor(width / 2)];
  const compare = () => {
    const [image, patch] = chosen, wanted = fields[image].subarray(patch * length, (patch + 1) * length);
    matches.forEach((figure, index) => {
      const field = fields[index], found = new Float32Array(height * width), pixels = new ImageData(width, height);
      for (let at = 0; at < found.length; at++) {
        let sum = 0;
        for (let k = 0; k < length; k++) sum += field[at * length + k] * wanted[k];
        found[at] = sum;
        const colour = 3 * Math.round(255 * clamp(sum, 0, 1));
        pixels.data.set([palette[colour], palette[colour + 1], palette[colour + 2], 255], 4 * at);
      }
      cosines[index] = found;
      one("canvas", figure).getContext("2d").putImageData(pixels, 0, 0);
      const best = index === image ? patch : found.indexOf(found.reduce((a, b) => Math.max(a, b)));
      Object.assign(one(".box", figure).style, {
        top: `${100 * Math.floor(best / width) / height}%`, left: `${100 * (best % width) / width}%`,
        height: `${100 / height}%`, width: `${100 / width}%`,
      });
      figure.classList.toggle("chosen", index === image);
      one("output", figure).textContent = index === image ? "chosen" : found[best].toFixed(2).replace("-", "\u2212");
    });
  };
  matches.forEach((figure, index) => {
    const cell = one(".cell", figure);
    cell.addEventListener("click", (event) => {
      const [row, column] = place(cell, event, height, width);
      chosen = [index, row * width + column];
      compare();
    });
    cell.addEventListener("pointermove", (event) => {
      const [row, column] = place(cell, event, height, width);
      tell(`cosine ${short(cosines[index][row * width + column])} at ${position(row, column, height, width)}`, event);
    });
    cell.addEventListener("keydown", (event) => {
      const arrow = ARROWS[event.key];
      if (!arrow) return;
      event.preventDefault();
      const at = chosen[0] === index ? chosen[1] : 0;
      const row = clamp(Math.floor(at / width) + arrow[1], 0, height - 1), column = clamp(at % width + arrow[0], 0, width - 1);
      chosen = [index, row * width + column];
      compare();
    });
    cell.addEventListener("pointerleave", () => tell(""));
  });
  one("#correspondence").hidden = false;
  compare();
}
