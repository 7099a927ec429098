document.documentElement.classList.add("js");
const dialog = document.getElementById("large");
const prompts = [...document.querySelectorAll(".prompt")];
let shown = 0;
function show(index) {
  shown = (index + prompts.length) % prompts.length;
  dialog.querySelector("p").textContent = prompts[shown].querySelector("p").textContent;
  dialog.querySelector(".large").replaceChildren(...[...prompts[shown].querySelectorAll("img")].map(image => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = image.dataset.arm;
    figure.append(image.cloneNode(), caption);
    return figure;
  }));
  if (!dialog.open) dialog.showModal();
}
prompts.forEach((prompt, index) => prompt.querySelectorAll("img").forEach(image => {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => show(index));
  image.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(index); }
  });
}));
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowRight") show(shown + 1);
  if (event.key === "ArrowLeft") show(shown - 1);
});
dialog.addEventListener("click", event => {
  const step = event.target.dataset.step;
  if (step) show(shown + Number(step));
  else if (event.target === dialog || event.target.dataset.close) dialog.close();
});
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach(part => { part.open = true; });
});
