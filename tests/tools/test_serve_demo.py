"""`make serve-demo`: it trains what is missing, and starts the service that it prints."""

import demo
import serve_demo


def test_it_serves_the_demo(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    trained, commands = [], []

    class Serve:
        parser = serve_demo.serve.parser

        def __call__(self, command):
            commands.append(self.parser().parse_args(command))
            return 0

    monkeypatch.setattr(serve_demo, "serve", Serve())
    monkeypatch.setattr(demo, "main", lambda arguments: trained.append(arguments) or 0)
    assert serve_demo.main(["--port", "9000"]) == 0
    assert trained == [[]]
    [options] = commands
    assert (options.host, options.port, options.demo_page) == ("127.0.0.1", 9000, True)
    assert f"http://127.0.0.1:{options.port}/v1/check" in capsys.readouterr().out
    (tmp_path / options.model / "export").mkdir(parents=True)
    (tmp_path / options.model / "export/config.json").touch()
    assert serve_demo.main([]) == 0
    assert len(trained) == 1
    monkeypatch.setattr(demo, "main", lambda _: 2)
    (tmp_path / options.model / "export/config.json").unlink()
    assert serve_demo.main([]) == 2
    assert len(commands) == 2
