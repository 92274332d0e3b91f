// What is shown follows the address; keys and clicks change the address.

function currentId() {
  const found = /^#latent=(\d+)$/.exec(location.hash);
  return found ? Number(found[1]) : null;
}

function show() {
  const id = currentId();
  const latent = latents.find((each) => each.id === id);
  document.getElementById("overview").hidden = id !== null;
  document.getElementById("latent").hidden = id === null;
  if (latent) drawLatent(latent);
  else if (id !== null) document.getElementById("latent").replaceChildren(absent(id));
  markCurrent(id);
  document.getElementById("main").scrollTop = 0;
}

function absent(id) {
  return el("p", { class: "empty" }, `Latent ${id} is not on this page: it is dead, was not chosen, or does not exist. `,
    el("code", {}, `crosslens show RUN ${id}`), " shows any latent in a terminal. ", el("a", { href: "#" }, "Overview"));
}

function onKey(event) {
  const search = document.getElementById("search");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === search) {
    if (event.key === "Escape") search.blur();
    if (event.key === "Enter" && list.shown.length) location.hash = `latent=${list.shown[0].id}`;
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    search.focus();
    search.select();
  }
  if (event.key === "j" || event.key === "k") {
    const id = neighbour(currentId(), event.key === "j" ? 1 : -1);
    if (id !== undefined) location.hash = `latent=${id}`;
  }
}

function nextTheme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const names = ["auto", "light", "dark"];
  const name = names[(names.indexOf(root.dataset.theme ?? "auto") + 1) % 3];
  root.dataset.theme = name;
  button.textContent = `theme: ${name}`;
  button.setAttribute("aria-label", name === "auto" ? "Colours: as the system has them" : `Colours: ${name}`);
}

document.getElementById("theme").addEventListener("click", nextTheme);
unpack().then(() => {
  for (const head of document.querySelectorAll("#latents th[data-key]")) {
    head.querySelector("button").addEventListener("click", () => sortBy(head.dataset.key));
  }
  document.getElementById("search").addEventListener("input", drawList);
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", show);
  drawList();
  drawTops();
  drawLabels();
  show();
  document.documentElement.dataset.ready = "true";
});
