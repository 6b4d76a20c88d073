// Runs once in the page, with gradio's element, props, watch and trigger. `props.value` is the JSON that spark-app
// makes: pictures as data: addresses, distances as base64 of uint16 [height, width], `step` metres each.
const root = element.querySelector(".depth-viewer");
const find = (name) => root.querySelector(name);
const invitation = find(".reading").textContent;
let shown = null;
let at = null; // the pixel that was under the pointer last

function show() {
  const before = shown;
  shown = props.value ? JSON.parse(props.value) : null;
  if (!shown || !before || shown.photo !== before.photo) at = null;
  root.hidden = !shown;
  if (!shown) return;
  const bytes = Uint8Array.from(atob(shown.distances), (letter) => letter.charCodeAt(0));
  shown.table = new DataView(bytes.buffer);
  find(".photo").src = shown.photo;
  find(".colours").src = shown.colours;
  find(".scale").style.setProperty("--ramp", shown.ramp);
  find(".near").textContent = shown.near;
  find(".far").textContent = shown.far;
  for (const marks of root.querySelectorAll(".marks")) {
    marks.replaceChildren(
      ...shown.points.map((point) => {
        const mark = place(document.createElement("div"), point.x, point.y);
        mark.className = point.chosen ? "mark chosen" : "mark";
        if (point.x > 0.7 * shown.columns) mark.classList.add("left"); // its label would leave the picture
        const label = document.createElement("span");
        label.textContent = point.label;
        mark.append(label);
        return mark;
      })
    );
  }
  read();
}

// Tell the distance at the last pixel, and mark it: of another calibration, another distance.
function read() {
  find(".reading").textContent = at ? `${metres(...at).toFixed(2)} m at column ${at[0]}, row ${at[1]}` : invitation;
  if (!at) return;
  for (const marks of root.querySelectorAll(".marks")) {
    let cross = marks.querySelector(".cross");
    if (!cross) {
      cross = document.createElement("div");
      cross.className = "cross";
      marks.append(cross);
    }
    place(cross, ...at);
  }
}

// Put an element over the middle of a pixel of the photo.
function place(item, x, y) {
  item.style.left = `${((x + 0.5) / shown.columns) * 100}%`;
  item.style.top = `${((y + 0.5) / shown.rows) * 100}%`;
  return item;
}

// The pixel of the photo under the pointer.
function pixel(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const at = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return [at((event.clientX - box.left) / box.width, shown.columns), at((event.clientY - box.top) / box.height, shown.rows)];
}

function metres(x, y) {
  const column = Math.min(Math.floor(((x + 0.5) / shown.columns) * shown.width), shown.width - 1);
  const row = Math.min(Math.floor(((y + 0.5) / shown.rows) * shown.height), shown.height - 1);
  return shown.table.getUint16(2 * (row * shown.width + column), true) * shown.step;
}

for (const pane of root.querySelectorAll(".pane")) {
  pane.addEventListener("pointermove", (event) => {
    if (!shown) return;
    at = pixel(event);
    read();
  });
  pane.addEventListener("click", (event) => {
    if (!shown) return;
    const [x, y] = pixel(event);
    trigger("pick", { x, y });
  });
}
watch("value", show);
show();
