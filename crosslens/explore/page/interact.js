// The interactions' section: what each latent that it names is most active on.

function drawLabels() {
  for (const place of document.querySelectorAll("[data-tokens]")) {
    const latent = latents.find((each) => each.id === Number(place.dataset.tokens));
    if (!latent) continue;
    place.replaceChildren(...data.label[latent.index].map((piece) => token(data.pieces[piece], data.special.has(piece))));
  }
}

// Of one latent, for its own view: with whom it interacts most, as the section's ranking has it.
function partnersOf(latent) {
  const partners = data.interact?.[latent.id];
  if (!partners) return [];
  const rows = partners.map(([other, site, kind, strength]) => el("tr", {},
    el("td", {}, data.id.includes(other) ? el("a", { href: `#latent=${other}` }, String(other)) : String(other)),
    el("td", {}, site), el("td", {}, kind), el("td", {}, number(strength))));
  const title = "Measured pairs with this latent, by strength × frequency; the figure is the strength: mean Σ over neurons of ‖w_out‖·|Δ| where both are active";
  return [el("section", {}, el("h3", { title }, "Interacts with"),
    el("table", { class: "partners" }, el("tbody", {}, ...rows)))];
}
