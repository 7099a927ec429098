// A button that ends something asks first: it has to be pressed twice. The cards are redrawn while a run goes on,
// so the button that had the focus gets it back, and a button that asks still asks.
let held = null, asked = null;
const keyOf = (button) => button && button.dataset.act + ' ' + button.dataset.of;
element.addEventListener('focusin', (event) => { held = keyOf(event.target.closest('button[data-act]')); });
element.addEventListener('focusout', (event) => { if (event.relatedTarget) { held = null; ask(null); } });
const ask = (key) => {
  asked = key;
  element.querySelectorAll('button[data-sure]').forEach((button) => {
    const is_asked = asked !== null && keyOf(button) === asked;
    button.classList.toggle('fl-sure', is_asked);
    button.textContent = is_asked ? button.dataset.sure : button.dataset.name;
  });
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button) return;
  if (button.dataset.sure && asked !== keyOf(button)) { ask(keyOf(button)); return; }
  ask(null);
  trigger('click', {act: button.dataset.act, of: button.dataset.of});
});
element.addEventListener('keydown', (event) => { if (event.key === 'Escape') ask(null); });
document.addEventListener('pointerdown', (event) => {
  if (asked && !event.target.closest('button[data-sure].fl-sure')) ask(null);
});
watch('value', () => {
  ask(asked);
  if (!held || document.activeElement !== document.body) return;
  [...element.querySelectorAll('button[data-act]')].find((button) => keyOf(button) === held)?.focus();
});
