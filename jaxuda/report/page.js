"use strict";
// A table that is wider than the screen says that it scrolls.
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    target.parentNode.classList.toggle("overflows", target.scrollWidth > target.clientWidth);
  }
});
document.querySelectorAll(".scroll").forEach((box) => sized.observe(box));

// The gallery: one slider goes through the layers of all its images; between two layers, the next is wiped in.
document.documentElement.classList.add("js");
for (const gallery of document.querySelectorAll(".gallery")) {
  const slider = gallery.querySelector("input[type=range]");
  const buttons = [...gallery.querySelectorAll("button")];
  const frames = [...gallery.querySelectorAll(".frame")];

  const show = () => {
    const value = Number(slider.value);
    const below = Math.floor(value);
    const share = value - below;
    for (const frame of frames) {
      [...frame.children].forEach((layer, index) => {
        // The first layer gives the frame its height and stays, covered.
        layer.style.visibility = index === below || (share && index === below + 1) ? "visible" : "hidden";
        layer.style.clipPath = share && index === below + 1 ? `inset(0 ${100 - 100 * share}% 0 0)` : "";
      });
    }
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === value)));
    const names = buttons.map((button) => button.textContent);
    const spoken = share ? `${Math.round(100 * share)}% ${names[below + 1]} over ${names[below]}` : names[below];
    slider.setAttribute("aria-valuetext", spoken);
    gallery.querySelector(".shown").textContent = spoken;
  };

  const move = (value) => {
    slider.value = value;
    show();
  };

  slider.addEventListener("input", show);
  slider.addEventListener("keydown", (event) => {
    const value = Number(slider.value);
    const steps = { ArrowRight: 0.25, ArrowUp: 0.25, ArrowLeft: -0.25, ArrowDown: -0.25 };
    const target = { PageUp: Math.floor(value) + 1, PageDown: Math.ceil(value) - 1 }[event.key];
    if (event.key in steps) move(Math.round(4 * value) / 4 + steps[event.key]);
    else if (target !== undefined) move(target);
    else return;
    event.preventDefault();
  });
  buttons.forEach((button, index) => button.addEventListener("click", () => move(index)));
  show();
}
