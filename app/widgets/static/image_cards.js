// The cards of the images: captions are saved while they are typed, pictures are enlarged, images removed.
//
// The browser keeps a typed text until the app has confirmed that it is saved. It is saved again when the app answers,
// or after a reload; if the caption has changed meanwhile, both are shown to choose from. A caption that was `sent`
// may have been saved though its answer was lost: then the browser finds its own text.
//
// Gradio compares old and new HTML: an element may stand for another image after it, and a field that was typed in
// keeps its text. So each drawing ends in `arrange`, and delayed work looks its card up by its key.

const PAUSE = 700;  // milliseconds without a letter until the text is saved
const AGAIN = 5000;  // milliseconds until a caption that was not saved is tried once more

const states = new Map();
const session = () => element.querySelector('.fl-photos')?.dataset.session || '';
const cards = () => [...element.querySelectorAll('.fl-photo')];
const cardOf = (event) => event.target.closest('.fl-photo');
const keyOf = (card) => `flatlora-caption ${session()} ${card.dataset.image} ${card.dataset.content}`;
const stateOf = (key) => states.get(key) || states.set(key, {sent: []}).get(key);
const say = (card, text) => {
  const place = card.querySelector('[role=status]');
  if (place.textContent !== text) place.textContent = text;
};
const ask = async (name, card, more) => {
  try { return await server[name]({session: session(), image: card.dataset.image, ...more}); } catch (error) {}
};
const copyOf = (key) => {
  try { return stateOf(key).copy ?? JSON.parse(localStorage.getItem(key)); } catch (error) { return null; }
};
const forget = (key) => {
  stateOf(key).copy = null;
  try { localStorage.removeItem(key); } catch (error) {}
};
const keep = (card) => {
  const key = keyOf(card), state = stateOf(key), text = card.querySelector('textarea').value;
  const copy = {text, version: card.dataset.version, sent: state.sent};
  state.copy = copy;
  try { localStorage.setItem(key, JSON.stringify(copy)); } catch (error) {}
};
const isOwn = (sent, text) => sent.some((one) => one.normalize('NFC').trim().replace(/\s+/g, ' ') === text);
const saveLater = (key, milliseconds) => {
  const state = stateOf(key);
  clearTimeout(state.timer);
  state.timer = setTimeout(() => {
    const card = cards().find((one) => keyOf(one) === key);
    if (card) save(card);
  }, milliseconds);
};
const save = async (card) => {
  const key = keyOf(card), state = stateOf(key), field = card.querySelector('textarea'), text = field.value;
  clearTimeout(state.timer);
  if (state.isSaving || card.classList.contains('fl-clash')) return;
  if (text === field.defaultValue || text === state.saved) {
    forget(key);
    if (card.classList.contains('fl-unsaved')) say(card, '');
    card.classList.remove('fl-unsaved');
    return;
  }
  if (!card.classList.contains('fl-unsaved')) say(card, 'Saving ...');
  const before = state.sent;
  state.sent = [...new Set([...before, text])];
  keep(card);
  state.isSaving = true;
  const answer = await ask('save_card', card, {version: card.dataset.version, text, goes_on: Boolean(state.goesOn)});
  state.isSaving = false;
  if (answer?.version !== undefined) state.sent = [];
  if (answer?.is_saved && copyOf(key)?.text === text) forget(key);
  if (!card.isConnected || keyOf(card) !== key) return;
  if (answer?.version === undefined) {
    const isTriedAgain = !answer || answer.can_retry;
    const kept = '. Your text is kept in this browser, and saving it is tried again.';
    say(card, (answer?.message ?? 'Not saved: the app does not answer') + (isTriedAgain ? kept : ''));
    card.classList.add('fl-unsaved');
    if (isTriedAgain) saveLater(key, AGAIN);
    return;
  }
  card.classList.remove('fl-unsaved');
  const isLate = !answer.is_saved && isOwn(before, answer.text);
  if (!answer.is_saved && !isLate) { choose(card, answer); return; }
  card.dataset.version = answer.version;
  field.defaultValue = answer.text;
  if (isLate) { save(card); return; }
  Object.assign(state, {saved: text, goesOn: true});
  if (field.value !== text) { keep(card); saveLater(key, PAUSE); }
  else if (document.activeElement !== field) field.value = answer.text;
  say(card, 'Saved');
  trigger('input');
};
const choose = (card, other) => {
  const field = card.querySelector('textarea'), place = card.querySelector('[role=status]');
  card.classList.add('fl-clash');
  say(card, `Not saved, as the caption has changed meanwhile: ${other.text || 'nothing'}`);
  const take = (isMine) => {
    card.classList.remove('fl-clash');
    card.dataset.version = other.version;
    field.defaultValue = other.text;
    if (!isMine) field.value = other.text;
    say(card, '');
    field.focus();
    save(card);
  };
  place.append(document.createElement('br'));
  for (const [label, isMine] of [['Keep mine', true], ['Take the other', false]]) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = label;
    button.addEventListener('click', (event) => { event.stopPropagation(); take(isMine); });
    place.append(button);
  }
};
const arrange = () => cards().forEach((card) => {
  const key = keyOf(card), copy = copyOf(key), state = stateOf(key), field = card.querySelector('textarea');
  const text = copy ? copy.text : field.defaultValue;
  state.saved = undefined;
  if (field.value !== text) field.value = text;
  if (!copy || state.isSaving) return;
  if (text === field.defaultValue) forget(key);
  else if (copy.version === card.dataset.version || isOwn(copy.sent, field.defaultValue)) save(card);
  else choose(card, {version: card.dataset.version, text: field.defaultValue});
});
watch('value', arrange);
arrange();

// One listener for all cards. Enter goes on to the next caption, as in a list.
element.addEventListener('focusin', (event) => {
  if (event.target.matches('textarea')) stateOf(keyOf(cardOf(event))).goesOn = false;
});
element.addEventListener('input', (event) => {
  if (!event.target.matches('textarea')) return;
  keep(cardOf(event));
  saveLater(keyOf(cardOf(event)), PAUSE);
});
element.addEventListener('change', (event) => { if (event.target.matches('textarea')) save(cardOf(event)); });
element.addEventListener('keydown', (event) => {
  if (!event.target.matches('textarea') || event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  const fields = [...element.querySelectorAll('textarea')];
  const next = fields[fields.indexOf(event.target) + 1];
  next ? next.focus() : event.target.blur();
});

// A picture is enlarged immediately, and sharpened when the app has answered.
const enlarge = async (card) => {
  const dialog = document.createElement('dialog'), picture = document.createElement('img');
  const line = document.createElement('p'), close = document.createElement('button');
  const name = card.querySelector('b').textContent;
  picture.addEventListener('load', () => {
    picture.style.setProperty('--ratio', picture.naturalWidth / picture.naturalHeight);
  });
  picture.src = card.querySelector('img').src;
  picture.alt = name;
  line.textContent = name;
  close.type = 'button';
  close.textContent = 'Close';
  dialog.setAttribute('aria-label', name);
  dialog.append(picture, line, close);
  dialog.addEventListener('click', () => dialog.close());
  dialog.addEventListener('close', () => dialog.remove());
  element.append(dialog);
  dialog.showModal();
  const answer = await ask('enlarge_card', card);
  if (answer?.picture) picture.src = answer.picture;
  line.textContent = `${name}: ${answer?.message ?? 'as small as on its card, as the app does not answer'}`;
};

const remove = async (card, button) => {
  if (!button.classList.contains('fl-sure')) {
    button.classList.add('fl-sure');
    button.textContent = 'Remove it?';
    button.addEventListener('blur', () => { button.classList.remove('fl-sure'); button.textContent = 'Remove'; },
      {once: true});
    return;
  }
  const other = card.nextElementSibling || card.previousElementSibling, key = keyOf(card);
  const answer = await ask('remove_card', card);
  if (answer?.message !== '') { say(card, answer?.message ?? 'Not removed: the app does not answer.'); return; }
  forget(key);
  other?.querySelector('textarea').focus();
  card.remove();
  trigger('submit');
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('.fl-photo button');
  if (button?.matches('[data-enlarge]')) enlarge(cardOf(event));
  if (button?.matches('[data-remove]')) remove(cardOf(event), button);
});
